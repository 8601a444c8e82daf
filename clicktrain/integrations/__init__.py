"""Callbacks for other people's training loops: Lightning, Transformers, Accelerate, Ultralytics.

One module for each, which imports its package and drives the `clicktrain.methods.Pruner` as any loop does.
Nothing here is imported by the rest of the library.
"""
