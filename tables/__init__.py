"""Measures what other libraries do, each in an environment of its own: the tables of docs/."""
