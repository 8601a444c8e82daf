"""What processes exchange in a training step, and the time that takes over slow links: ``bench exchange``.

`measure` is what others call; nothing is imported here, so that the hub starts without PyTorch.
"""
