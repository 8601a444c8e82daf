"""Methods: compositions of criterion, granularity, schedule or trigger, and enforcement.

The registry is the list of methods: a new one is a file and a line here.
"""

from __future__ import annotations

from typing import Any

from clicktrain.methods.admm_patterns import AdmmPatterns
from clicktrain.methods.base import Method, PruningPlan
from clicktrain.methods.campfire import Campfire
from clicktrain.methods.channels_then_patterns import ChannelsThenPatterns
from clicktrain.methods.clicktrain import ClickTrain
from clicktrain.methods.clicktrain_gradual import GradualClickTrain
from clicktrain.methods.dense import Dense
from clicktrain.methods.driver.pruner import Pruner
from clicktrain.methods.dsr import DSR
from clicktrain.methods.gmp import GMP
from clicktrain.methods.granet import GraNet
from clicktrain.methods.mest import MEST
from clicktrain.methods.nm import NM
from clicktrain.methods.pat import PaT
from clicktrain.methods.prunetrain import PruneTrain
from clicktrain.methods.rigl import RigL
from clicktrain.sparsity.registry import Registry

METHODS: Registry[type[Method[Any]]] = Registry(
    "method",
    {
        method.name: method
        for method in (
            Dense, ClickTrain, PruneTrain, ChannelsThenPatterns, Campfire, DSR, RigL, PaT, GraNet, MEST,
            GMP, NM, GradualClickTrain, AdmmPatterns,
        )
    },
    group="clicktrain.methods",
)  # fmt: skip
"""Key -> class, in the order in which help lists them."""

__all__ = [
    "DSR",
    "GMP",
    "MEST",
    "METHODS",
    "NM",
    "AdmmPatterns",
    "Campfire",
    "ChannelsThenPatterns",
    "ClickTrain",
    "Dense",
    "GraNet",
    "GradualClickTrain",
    "Method",
    "PaT",
    "PruneTrain",
    "Pruner",
    "PruningPlan",
    "RigL",
]
