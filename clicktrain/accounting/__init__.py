"""What a network costs: weights, FLOPs per pass, bytes moved."""

from clicktrain.accounting.cost import LayerCost, ModelCost
from clicktrain.accounting.counting import compression_ratio, count

__all__ = ["LayerCost", "ModelCost", "compression_ratio", "count"]
