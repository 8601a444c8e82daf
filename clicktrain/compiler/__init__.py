"""The compiler: which layers of a pruned network run sparse, and the network rewritten so (section 5.4)."""

from clicktrain.compiler.api import accelerate
from clicktrain.compiler.masked_latency import MaskedLatency
from clicktrain.compiler.module import Accelerated
from clicktrain.compiler.plan import Choice, LoweringPlan

__all__ = ["Accelerated", "Choice", "LoweringPlan", "MaskedLatency", "accelerate"]
