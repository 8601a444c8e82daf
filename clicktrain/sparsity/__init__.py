"""Pure functions on tensors: patterns, importance, selection, allocation, penalties and triggers."""
