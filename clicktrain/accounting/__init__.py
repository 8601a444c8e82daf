"""What a network costs: weights, FLOPs per pass, bytes moved, memory of a training iteration."""

from clicktrain.accounting.cost import LayerCost, ModelCost
from clicktrain.accounting.counting import compression_ratio, count
from clicktrain.accounting.memory import TrainingMemory, measure_training_memory, training_memory

__all__ = [
    "LayerCost",
    "ModelCost",
    "TrainingMemory",
    "compression_ratio",
    "count",
    "measure_training_memory",
    "training_memory",
]
