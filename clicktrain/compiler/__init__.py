"""The compiler: which layers of a pruned network run sparse, and the network rewritten so (section 5.4)."""

from clicktrain.compiler.api import MaskedLatency, accelerate
from clicktrain.compiler.module import Accelerated
from clicktrain.compiler.plan import Choice, LoweringPlan, dtypes_worth_measuring
from clicktrain.compiler.recorded_step import RecordedStep

__all__ = [
    "Accelerated",
    "Choice",
    "LoweringPlan",
    "MaskedLatency",
    "RecordedStep",
    "accelerate",
    "dtypes_worth_measuring",
]
