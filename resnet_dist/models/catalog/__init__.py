"""Architectures by name, option and size. Imports no torch."""
