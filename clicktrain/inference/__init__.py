"""Trained networks as programs of few operations, and the C code that runs them without PyTorch."""
