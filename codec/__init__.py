"""JPEG in C: the fast decoder of regular JPEGs, and libjpeg-turbo for all others."""
