"""Methods: compositions of criterion, granularity, schedule or trigger, and enforcement."""

from __future__ import annotations

from typing import Any

from clicktrain.methods.base import Method, PruningPlan
from clicktrain.methods.campfire import Campfire
from clicktrain.methods.channels_then_patterns import ChannelsThenPatterns
from clicktrain.methods.clicktrain import ClickTrain
from clicktrain.methods.dense import Dense
from clicktrain.methods.driver.pruner import Pruner
from clicktrain.methods.dsr import DSR
from clicktrain.methods.pat import PaT
from clicktrain.methods.prunetrain import PruneTrain
from clicktrain.methods.rigl import RigL

METHODS: dict[str, type[Method[Any]]] = {
    "dense": Dense,
    "clicktrain": ClickTrain,
    "prunetrain": PruneTrain,
    "prunetrain-clicktrain": ChannelsThenPatterns,
    "campfire": Campfire,
    "dsr": DSR,
    "rigl": RigL,
    "pat": PaT,
}

__all__ = [
    "DSR",
    "METHODS",
    "Campfire",
    "ChannelsThenPatterns",
    "ClickTrain",
    "Dense",
    "Method",
    "PaT",
    "PruneTrain",
    "Pruner",
    "PruningPlan",
    "RigL",
]
