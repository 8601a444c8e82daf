"""Kernels with code of their own for each tap pattern."""
