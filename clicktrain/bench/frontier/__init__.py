"""Accuracy against what it costs: a grid of dense and pruned runs, and the frontier of the dense ones."""
