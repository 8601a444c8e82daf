"""Activation functions that kernels apply on their way: names and settings of what ``activations.h`` has."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from clicktrain.errors import UserError

NAMES = ("none", "relu", "clamp", "leaky", "hardswish", "silu", "gelu", "gelu_tanh")
"""In the order of their numbers in ``activations.h``."""
_SETTINGS = {"clamp": 2, "leaky": 1}


@dataclass(frozen=True, slots=True)
class Activation:
    """One function: ``clamp`` to [low, high], ``leaky`` with the slope ``low`` > 0 below zero, or of `NAMES`.

    Operators take it as text, such as ``relu`` or ``clamp 0.0 6.0``.
    """

    name: str = "none"
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"an activation is one of {', '.join(NAMES)}, not {self.name!r}")
        if self.name == "leaky" and not self.low > 0:
            raise UserError(f"the slope of a leaky ReLU is positive here, not {self.low}")
        if self.name == "clamp" and not self.low <= self.high:
            raise UserError(f"clamping is from low to high, not from {self.low} to {self.high}")

    @property
    def number(self) -> int:
        """In ``activations.h``."""
        return NAMES.index(self.name)

    @property
    def by_result(self) -> bool:
        """Whether the gradient can be computed from the result instead of the argument."""
        return self.name in ("relu", "clamp", "leaky")

    def __str__(self) -> str:
        numbers = (self.low, self.high)[: _SETTINGS.get(self.name, 0)]
        return " ".join([self.name, *map(repr, numbers)])

    @classmethod
    @functools.cache
    def read(cls, text: str) -> Activation:
        """Inverse of ``str``; a UserError if it is no activation."""
        name, *numbers = text.split(" ")
        if len(numbers) != _SETTINGS.get(name, 0):
            raise UserError(f"{text!r} is no activation")
        try:
            return cls(name, *map(float, numbers))
        except ValueError as error:
            raise UserError(f"{text!r} is no activation: {error}") from error


NONE = Activation()
