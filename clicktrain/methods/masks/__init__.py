"""Parts of methods that mask weights or kernels."""
