"""Parts of ClickTrain: patterns and kernels."""
