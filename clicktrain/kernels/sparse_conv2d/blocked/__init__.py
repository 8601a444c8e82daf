"""Convolution in the batch-blocked layout, by generated C."""
