"""Physical removal of channels and layers: dependency analysis, plans, and the one mutator."""

from clicktrain.surgery.apply import apply_surgery_, silence_
from clicktrain.surgery.dependency_analysis import channel_groups, dependencies
from clicktrain.surgery.groups import ChannelGroup, Member
from clicktrain.surgery.layer_removal import residual_branches
from clicktrain.surgery.plan import (
    Cut,
    Gate,
    LayerChange,
    OriginalChannels,
    RemovedLayer,
    SurgeryPlan,
    original_channels,
    renumbered,
)
from clicktrain.surgery.planning import plan_keeping, plans_from_zeros
from clicktrain.surgery.recipe import (
    SAVED,
    agreed_plans,
    apply_plans_,
    apply_recipe_,
    load_pruned,
    plans_in,
    read_recipe,
    write_recipe,
)
from clicktrain.surgery.record import plans_of
from clicktrain.surgery.verify import Verified, plan_from_keep, plan_from_zeros, verified

__all__ = [
    "SAVED",
    "ChannelGroup",
    "Cut",
    "Gate",
    "LayerChange",
    "Member",
    "OriginalChannels",
    "RemovedLayer",
    "SurgeryPlan",
    "Verified",
    "agreed_plans",
    "apply_plans_",
    "apply_recipe_",
    "apply_surgery_",
    "channel_groups",
    "dependencies",
    "load_pruned",
    "original_channels",
    "plan_from_keep",
    "plan_from_zeros",
    "plan_keeping",
    "plans_from_zeros",
    "plans_in",
    "plans_of",
    "read_recipe",
    "renumbered",
    "residual_branches",
    "silence_",
    "verified",
    "write_recipe",
]
