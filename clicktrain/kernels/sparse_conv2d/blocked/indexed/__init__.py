"""Kernels that read the offsets of kept taps from a table."""
