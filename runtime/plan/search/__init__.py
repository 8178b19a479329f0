"""Layouts: which fit, which is fastest, and why the others lose."""
