"""Data sets in shards, read as a stream: memory does not grow with the number of images."""
