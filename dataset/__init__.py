"""The dataset on disk, shared by what writes it and what reads it."""
