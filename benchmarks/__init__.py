"""Measurements, one script per question; run them as `python -m benchmarks.NAME`. What they share is in harness.py."""
