"""Measures a run, finds what limits it, and says what to change."""
