"""What all blocked convolution kernels share: index arithmetic, the writer of C, the schedule of regions."""
