"""What the compiler decided, as data: printed, saved, edited by hand, replayed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from clicktrain.compiler import plan_fields as check
from clicktrain.errors import UserError
from clicktrain.files import read_text
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, Phase, Tiling
from clicktrain.latency.machine import Machine

RULES = ("measured", "density", "sparse")
KINDS = ("conv", "batch_norm", "elementwise", "pool", "global_pool", "cat")
Layout = Literal["blocked", "plain"]
"""``blocked``: ``[N/V, C, H, W, V]``; ``plain``: ``[N, C, H, W]``, contiguous or channels last."""
Activations = Literal["parameters", "bf16"]
"""What blocked regions keep activations in: the parameters' number type, or bfloat16 computed in float32."""
ACTIVATIONS: tuple[Activations, ...] = ("parameters", "bf16")
DENSE = ("nchw fp32", "channels_last fp32", "nchw bf16", "channels_last bf16")
"""Ways to run a dense convolution: memory format and number type."""


def activations_of(dtypes: Sequence[str], dtype: torch.dtype) -> tuple[Activations, ...]:
    """What activations may be kept in by a network of that type that may compute in ``dtypes``."""
    if dtype is not torch.float32:
        return ACTIVATIONS[:1]
    allowed = {"parameters": "fp32", "bf16": "bf16"}
    return tuple(one for one in ACTIVATIONS if allowed[one] in dtypes)


def kept_in(activations: Activations, dtype: torch.dtype) -> torch.dtype:
    """The number type that a network of type ``dtype`` then keeps activations in."""
    return torch.bfloat16 if activations == "bf16" and dtype is torch.float32 else dtype


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided for one node of the graph (a fused one stands under its first layer's name).

    Attributes:
        layer: path of the layer, with ``#2`` for its second call; for functions the node's name.
        kind: ``conv``, ``batch_norm``, ``elementwise``, ``pool``, ``global_pool`` or ``cat``.
        layout: where it runs. Edit it to force a layer: ``blocked`` or ``plain``.
        dense: how a convolution runs where ``layout`` is plain, one of `DENSE`.
        tilings: how the blocked convolution cuts its work, by phase; empty = by rule.
        weight: (F, C, R, S) of a convolution, else empty.
        image: (C, H, W) of the input in the example.
        density: kept weights / all weights; 1 for what has no sparse weight.
        predicted_ms: forward + backward as estimated from arithmetic and bytes.
        measured_ms: forward + backward as measured; None where nothing was.
        refused: the other ways to run it, with the time or the reason why not.
        statistics: whether a blocked convolution takes the statistics of the batch norm behind it on its way,
            in training. Edit it to force either; the norm has to run blocked and be its only reader.
    """

    layer: str
    kind: str
    layout: Layout
    dense: str = DENSE[0]
    tilings: tuple[tuple[Phase, Tiling], ...] = ()
    weight: tuple[int, ...] = ()
    image: tuple[int, ...] = ()
    density: float = 1.0
    predicted_ms: float | None = None
    measured_ms: float | None = None
    refused: tuple[str, ...] = ()
    statistics: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"{self.layer} is one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.layout not in ("blocked", "plain"):
            raise UserError(f"the layout of {self.layer} is 'blocked' or 'plain', not {self.layout!r}")
        if self.dense not in DENSE:
            raise UserError(f"{self.layer} can run dense as {', '.join(DENSE)}, not as {self.dense!r}")
        if not isinstance(self.statistics, bool):
            raise UserError(f"the statistics of {self.layer} are true or false, not {self.statistics!r}")
        if self.statistics and (self.kind != "conv" or self.layout != "blocked"):
            raise UserError(
                f"{self.layer} is no convolution that runs blocked, so it cannot take a batch norm's "
                "statistics: set its statistics to false"
            )

    @property
    def operator(self) -> str:
        """In words, for people."""
        if self.kind != "conv":
            return self.layout
        if self.layout == "plain":
            return f"dense {self.dense}"
        return "sparse blocked" if self.density < 1 else "dense blocked"


@dataclass(frozen=True, slots=True)
class LoweringPlan:
    """The compiler's decisions about a whole network: ClickTrain section 5.4.

    Attributes:
        rule: ``measured``, ``density`` or ``sparse``.
        batch: images in the example; the plan serves any other number.
        machine: where it was made.
        choices: in the graph's order.
        notes: sentences about what could not be accelerated.
        activations: what blocked regions keep their activations in, one of `ACTIVATIONS`. Edit it to force
            either; tilings that multiply pairs of bfloat16 numbers need ``bf16``.
    """

    rule: str
    batch: int
    machine: Machine
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()
    activations: Activations = "parameters"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"the rule of a plan is {', '.join(RULES)}, not {self.rule!r}")
        if self.activations not in ACTIVATIONS:
            raise UserError(
                f"the activations of a plan are {' or '.join(ACTIVATIONS)}, not {self.activations!r}"
            )
        for choice in self.choices:
            for phase, tiling in choice.tilings:
                if tiling.pairs and tiling.code != "indexed" and phase != "wgrad":
                    raise UserError(
                        f"{choice.layer} cannot multiply pairs in {phase} with code for tap patterns: set "
                        "the tiling's code to indexed, or its pairs to false"
                    )
                if tiling.code == "cache_blocked" and phase == "wgrad":
                    raise UserError(
                        f"{choice.layer} has no cache_blocked wgrad: set the tiling's code to unrolled "
                        "or indexed"
                    )
        pairs = self.with_pairs()
        if pairs and self.activations != "bf16":
            raise UserError(
                f"{pairs[0]} multiplies pairs of bfloat16 numbers, which its plan does not keep: set "
                "the plan's activations to bf16, or pairs of its tilings to false"
            )

    def with_pairs(self) -> list[str]:
        """Layers that multiply pairs of bfloat16 numbers."""
        return [c.layer for c in self.choices if any(tiling.pairs for _, tiling in c.tilings)]

    def blocked(self) -> list[Choice]:
        """What runs in the blocked layout."""
        return [choice for choice in self.choices if choice.layout == "blocked"]

    def by_layer(self) -> dict[str, Choice]:
        """Choices by `Choice.layer`."""
        return {choice.layer: choice for choice in self.choices}

    def to_json(self) -> str:
        """As indented text; `from_json` is the inverse."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> LoweringPlan:
        """Read a plan, perhaps one that was edited by hand.

        Raises:
            UserError: it is no plan; says where.
        """
        try:
            data = check.fields(json.loads(text), "a plan")
            choices = tuple(
                _choice(check.fields(one, "a choice")) for one in check.entries(data["choices"], "choices")
            )
            notes = tuple(
                check.text(note, "a note") for note in check.entries(data.get("notes", ()), "notes")
            )
            activations = data.get("activations", ACTIVATIONS[0])
            batch = check.whole(data["batch"], "batch", 1)
            return cls(
                check.text(data["rule"], "rule"),
                batch,
                _machine(data["machine"]),
                choices,
                notes,
                activations,
            )
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"this is no lowering plan: {type(error).__name__}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> LoweringPlan:
        """Read a plan from a file.

        Raises:
            UserError: it is no plan; names the file.
            OSError: it cannot be read.
        """
        text = read_text(path)
        try:
            return cls.from_json(text)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def without(self, unusable: Mapping[str, str], apart: Collection[str] = ()) -> LoweringPlan:
        """The plan with some layers in the plain layout.

        Args:
            unusable: layer -> why it cannot run blocked.
            apart: convolutions that leave the statistics to the norm behind them.
        """

        def changed(choice: Choice) -> Choice:
            if choice.layer in unusable and choice.layout == "blocked":
                refused = (*choice.refused, f"blocked: {unusable[choice.layer]}")
                return replace(choice, layout="plain", tilings=(), refused=refused, statistics=False)
            return replace(choice, statistics=choice.statistics and choice.layer not in apart)

        return replace(self, choices=tuple(changed(choice) for choice in self.choices))

    def table(self) -> list[dict[str, str]]:
        """Rows for people, one a convolution; the same columns in each."""
        rows = []
        for choice in self.choices:
            if choice.kind != "conv":
                continue
            rows.append(
                {
                    "layer": choice.layer,
                    "shape": "x".join(map(str, choice.weight)),
                    "image": "x".join(map(str, choice.image)),
                    "density": f"{choice.density:.3f}",
                    "operator": choice.operator,
                    "tiling": _tilings(choice),
                    "statistics": "taken" if choice.statistics else "",
                    "predicted_ms": _ms(choice.predicted_ms),
                    "measured_ms": _ms(choice.measured_ms),
                    "refused": "; ".join(choice.refused),
                }
            )
        return rows

    def __str__(self) -> str:
        rows = self.table()
        m = self.machine
        lines = [
            f"{self.rule} rule, {self.batch} images; {m.cpu}, {m.lanes} lanes, {m.threads} threads"
            + ("; activations in bf16" if self.activations == "bf16" else ""),
            *self.notes,
        ]
        if rows:
            rows = [dict(zip(rows[0], rows[0], strict=True)), *rows]
            widths = {key: max(len(row[key]) for row in rows) for key in rows[0]}
            lines += ["  ".join(row[key].ljust(widths[key]) for key in row).rstrip() for row in rows]
        others = [choice for choice in self.choices if choice.kind != "conv"]
        blocked = sum(choice.layout == "blocked" for choice in others)
        lines.append(f"{blocked} of {len(others)} other operations run blocked")
        return "\n".join(lines)


def _machine(value: Any) -> Machine:
    data = check.fields(value, "machine")
    cpu = check.text(data["cpu"], "cpu")
    return Machine(cpu, check.whole(data["lanes"], "lanes"), check.whole(data["threads"], "threads", 1))


def _choice(entry: Mapping[str, Any]) -> Choice:
    layer = check.text(entry["layer"], "layer")
    tilings = []
    for phase, tiling in check.entries(entry.get("tilings", ()), f"tilings of {layer}"):
        if phase not in PHASES:
            raise UserError(f"{layer}: a phase is one of {', '.join(PHASES)}, not {phase!r}")
        tilings.append((phase, Tiling.from_dict(check.fields(tiling, "a tiling"))))
    checked = {
        "tilings": tuple(tilings),
        "weight": check.sizes(entry.get("weight", ()), f"weight of {layer}"),
        "image": check.sizes(entry.get("image", ()), f"image of {layer}"),
        "density": check.share(entry.get("density", 1.0), f"density of {layer}"),
        "predicted_ms": check.milliseconds(entry.get("predicted_ms"), f"predicted_ms of {layer}"),
        "measured_ms": check.milliseconds(entry.get("measured_ms"), f"measured_ms of {layer}"),
        "refused": tuple(
            check.text(one, "refused") for one in check.entries(entry.get("refused", ()), "refused")
        ),
    }
    return Choice(**{**entry, **checked})


def _tilings(choice: Choice) -> str:
    if choice.layout != "blocked":
        return ""
    tiles = (
        "x".join(map(str, tiling.tile)) + " " + tiling.code + (" pairs" if tiling.pairs else "")
        for _, tiling in choice.tilings
    )
    return ", ".join(tiles) or "by rule"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
