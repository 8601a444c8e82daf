"""Triton kernels on activations with the batch innermost, ``[C, H, W, N]``, for GPUs with tensor cores."""
