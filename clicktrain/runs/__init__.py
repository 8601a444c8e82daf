"""A run's folder: its files, their format, and who may write there. Free of torch."""
