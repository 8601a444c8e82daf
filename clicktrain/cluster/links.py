"""Links by name, and the levels of a cluster that they connect."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from clicktrain.errors import UserError, shown

MOST_GPUS = 1_000_000


@dataclass(frozen=True)
class Link:
    """A link that sends and receives at once.

    Attributes:
        bandwidth: bytes per second in each direction.
        latency: seconds from the start of a message to its first byte, software included.
    """

    name: str
    bandwidth: float
    latency: float

    def __str__(self) -> str:
        return f"{self.name} ({self.bandwidth * 8 / 1e9:.4g} Gbit/s, {self.latency * 1e6:.4g} us)"


def _link(name: str, gbit: float, microseconds: float) -> Link:
    return Link(name, gbit * 1e9 / 8, microseconds * 1e-6)


LINKS = {
    link.name: link
    for link in (
        _link("ethernet-1g", 1, 50),
        _link("ethernet-10g", 10, 30),
        _link("ethernet-25g", 25, 20),
        _link("ethernet-100g", 100, 10),
        _link("ib-fdr", 54.5, 3),
        _link("ib-edr", 100, 3),
        _link("ib-hdr", 200, 3),
        _link("ib-ndr", 400, 3),
        _link("pcie3", 126, 5),
        _link("pcie4", 252, 5),
        _link("nvlink2", 1200, 3),
        _link("nvlink3", 2400, 3),
        _link("nvlink4", 3600, 3),
        _link("nvlink", 2400, 3),
    )
}
"""Nominal rates of one direction (16 lanes of PCIe, all NVLinks of a GPU), and latencies of a step of a
collective as they are usual, software included. ``nvlink`` is that of an A100."""

_UNITS = {"kbit/s": 1e3 / 8, "mbit/s": 1e6 / 8, "gbit/s": 1e9 / 8, "mb/s": 1e6, "gb/s": 1e9}
_TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBERS = re.compile(
    r"(?P<rate>[\d.]+(e\d+)?)\s*(?P<unit>[kmg]bit/s|[mg]b/s)\s*,\s*(?P<time>[\d.]+)\s*(?P<of>ns|us|µs|ms|s)",
    re.IGNORECASE,
)


def parse_link(text: str) -> Link:
    """Read a link: a name of `LINKS`, or numbers as in ``25Gbit/s,5us``.

    Raises:
        UserError: neither; says what would be right.
    """
    name = text.strip().lower()
    if name in LINKS:
        return LINKS[name]
    numbers = _NUMBERS.fullmatch(name)
    try:
        if numbers is not None:
            rate = float(numbers["rate"]) * _UNITS[numbers["unit"]]
            latency = float(numbers["time"]) * _TIMES[numbers["of"]]
            if 0 < rate < math.inf and latency < math.inf:
                return Link(text.strip(), rate, latency)
    except ValueError:  # two dots
        pass
    near = difflib.get_close_matches(name, LINKS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"link {shown(text)} is unknown: {hint}write one of {', '.join(LINKS)}, or bandwidth and "
        "latency as in 25Gbit/s,5us"
    )


@dataclass(frozen=True)
class Level:
    """A level of a cluster: ``size`` members, each of which is a GPU, or all of the level below.

    Attributes:
        link: what a member has to its neighbors in the ring.
        lanes: links of a member. What its GPUs send at the same time is spread over them.
    """

    size: int
    link: Link
    lanes: int = 1


@dataclass(frozen=True)
class Cluster:
    """GPUs that train together, in levels from the inside out: in a machine, between machines, ..."""

    levels: tuple[Level, ...]

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return math.prod(level.size for level in self.levels)

    @classmethod
    def of(cls, gpus: int, *, per_machine: int, inside: Link, between: Link, adapters: int = 1) -> Cluster:
        """A cluster of equal machines, or one machine if it holds all.

        Args:
            per_machine: GPUs of a machine.
            inside, between: links of a GPU in its machine, and of a machine to others.
            adapters: links of a machine to others, which its GPUs share.

        Raises:
            UserError: numbers out of range, or GPUs that do not fill the machines.
        """
        for name, value in (("gpus", gpus), ("gpus_per_machine", per_machine), ("adapters", adapters)):
            if not 1 <= value <= MOST_GPUS:
                raise UserError(f"{name} is {shown(value)}: a number from 1 to {MOST_GPUS:,} is needed")
        if gpus <= per_machine:
            return cls((Level(gpus, inside),))
        if gpus % per_machine:
            raise UserError(
                f"{gpus} GPUs do not fill machines of {per_machine}: give a multiple, or another "
                "gpus_per_machine"
            )
        return cls((Level(per_machine, inside), Level(gpus // per_machine, between, adapters)))

    def __str__(self) -> str:
        inner, *outer = self.levels
        parts = [f"{inner.size} GPUs by {inner.link}"] if inner.size > 1 or not outer else []
        parts += [
            f"{level.size} machines by {level.lanes if level.lanes > 1 else 'one'} {level.link}"
            for level in outer
        ]
        return ", ".join(parts)
