"""Measurements, a script for each question; run as python -m benchmarks.NAME, because preprocess.py here is not the package."""
