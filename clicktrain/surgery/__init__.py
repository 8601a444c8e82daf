"""Physical removal of channels and layers: dependency analysis, plans, and the one mutator."""

from clicktrain.surgery.apply import apply_surgery_
from clicktrain.surgery.groups import ChannelGroup, Member, channel_groups, dependencies
from clicktrain.surgery.plan import Cut, Gate, LayerChange, RemovedLayer, SurgeryPlan
from clicktrain.surgery.planning import plan_from_keep, plan_from_zeros

__all__ = [
    "ChannelGroup",
    "Cut",
    "Gate",
    "LayerChange",
    "Member",
    "RemovedLayer",
    "SurgeryPlan",
    "apply_surgery_",
    "channel_groups",
    "dependencies",
    "plan_from_keep",
    "plan_from_zeros",
]
