"""Finds the fastest loader settings on this machine."""
