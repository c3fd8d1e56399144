"""Measurements, one script per question; run them as `python -m benchmarks.NAME`. What they share is in harness.py."""

import time

BEGAN_S = time.perf_counter()  # before a script loads PyTorch and DALI
