"""The compiler's decisions as data: printed, saved, edited by hand, replayed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from clicktrain.compiler import plan_fields as check
from clicktrain.compiler.exchange import HOWS, Exchanged, exchanged_from, exchanged_line
from clicktrain.compiler.layout_choice import PLAIN
from clicktrain.errors import UserError
from clicktrain.files import read_text
from clicktrain.kernels.impls import PHASES, Impl, Phase, candidates_for
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.sparse_conv2d import IMPLS
from clicktrain.kernels.sparse_conv2d.api import OPERATOR
from clicktrain.latency.machine import Machine
from clicktrain.wording import table_lines

RULES = ("measured", "density", "sparse")
KINDS = ("conv", "batch_norm", "elementwise", "pool", "global_pool", "cat")
Activations = Literal["parameters", "bf16"]
"""Dtype of activations outside the plain layout: the parameters' own, or bfloat16 computed in float32."""
ACTIVATIONS: tuple[Activations, ...] = ("parameters", "bf16")
DENSE = ("nchw fp32", "channels_last fp32", "nchw bf16", "channels_last bf16")
"""Ways to run PyTorch's dense convolution: memory format and dtype."""


def dtypes_worth_measuring(bf16: bool) -> tuple[str, ...]:
    """List the dtypes for `accelerate` in a run whose forward passes compute in bfloat16 or in float32.

    Where the processor multiplies pairs of bfloat16 numbers, float32 is left out of a bfloat16 run: its
    kernels are slower there, and building them takes longer than all others.
    """
    tools = toolchain()
    if not bf16:
        return ("fp32",)
    return ("bf16",) if tools is not None and tools.simd.pairs else ("fp32", "bf16")


def activations_of(dtypes: Sequence[str], dtype: torch.dtype) -> tuple[Activations, ...]:
    """List the ways to keep activations of a network of ``dtype`` that may compute in ``dtypes``."""
    if dtype is not torch.float32:
        return ACTIVATIONS[:1]
    allowed = {"parameters": "fp32", "bf16": "bf16"}
    return tuple(one for one in ACTIVATIONS if allowed[one] in dtypes)


def activation_dtype(activations: Activations, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a network of ``dtype`` then keeps activations in."""
    return torch.bfloat16 if activations == "bf16" and dtype is torch.float32 else dtype


def held_dtype(layout: str, activations: Activations, dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations in one of its layouts: not every layout holds bfloat16."""
    half = layout in LAYOUTS and LAYOUTS[layout].half
    return activation_dtype(activations, dtype) if half else dtype


@dataclass(frozen=True, slots=True)
class Choice:
    """The decision about one node of the graph; a fused one stands under its first layer's name.

    Attributes:
        layer: path of the layer, with ``#2`` for its second call; for functions the node's name.
        kind: ``conv``, ``batch_norm``, ``elementwise``, ``pool``, ``global_pool`` or ``cat``.
        layout: of its activations: ``plain`` (``[N, C, H, W]``) or a key of
            `clicktrain.kernels.layouts.LAYOUTS`. Edit it to force a layer.
        dense: how PyTorch runs a convolution whose ``layout`` is plain, one of `DENSE`.
        tilings: how the implementation of a convolution cuts its work, by phase; empty = by its rule.
        weight: (F, C, R, S) of a convolution, else empty.
        image: (C, H, W) of the input in the example.
        density: nonzero weights / all weights; 1 for what has no sparse weight.
        predicted_ms: forward + backward as estimated from arithmetic and bytes.
        measured_ms: forward + backward as measured; None where nothing was.
        refused: the other ways to run it, with the time or the reason why not.
        statistics: whether a convolution takes the statistics of the batch norm behind it on its way, in
            training. Edit it to force either; the norm has to run in its layout and be its only reader.
        impl: implementation of a convolution, one of ``kernels.impls.IMPLS``; empty for the first one of its
            layout, and for PyTorch's dense convolution in the plain layout.
    """

    layer: str
    kind: str
    layout: str
    dense: str = DENSE[0]
    tilings: tuple[tuple[Phase, Any], ...] = ()
    weight: tuple[int, ...] = ()
    image: tuple[int, ...] = ()
    density: float = 1.0
    predicted_ms: float | None = None
    measured_ms: float | None = None
    refused: tuple[str, ...] = ()
    statistics: bool = False
    impl: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"{self.layer} is one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.layout not in (PLAIN, *LAYOUTS):
            known = " or ".join(map(repr, (*LAYOUTS, PLAIN)))
            raise UserError(f"the layout of {self.layer} is {known}, not {self.layout!r}")
        if self.impl and (
            self.kind != "conv" or self.impl not in {one.name for one in candidates_for(OPERATOR)}
        ):
            raise UserError(f"{self.layer} has no implementation {self.impl!r}")
        if self.impl and IMPLS[self.impl].layout != self.layout:
            raise UserError(
                f"{self.impl} runs {self.layer} in the {IMPLS[self.impl].layout} layout: set its layout to "
                "that, or its impl to ''"
            )
        if self.dense not in DENSE:
            raise UserError(f"{self.layer} can run dense as {', '.join(DENSE)}, not as {self.dense!r}")
        if not isinstance(self.statistics, bool):
            raise UserError(f"the statistics of {self.layer} are true or false, not {self.statistics!r}")
        if self.statistics and (self.kind != "conv" or self.layout == PLAIN):
            raise UserError(
                f"{self.layer} is no convolution that runs blocked, so it cannot take a batch norm's "
                "statistics: set its statistics to false"
            )
        if self.implementation is not None and self.implementation.read_tiling is not None:
            for phase, tiling in self.tilings:
                try:
                    self.implementation.read_tiling(phase, tiling)
                except UserError as error:
                    raise UserError(f"{self.layer} {error}") from error

    @property
    def implementation(self) -> Impl | None:
        """The implementation of a convolution; None for PyTorch's dense one, and for other kinds."""
        if self.kind != "conv" or (self.layout == PLAIN and not self.impl):
            return None
        return IMPLS[self.impl] if self.impl else default_implementation(self.layout)

    def about_tilings(self, question: Literal["needs_half", "slow_here"]) -> str:
        """The implementation's first answer about one of its tilings, "" if there is none."""
        impl = self.implementation
        if impl is None:
            return ""
        return next(filter(None, (getattr(impl, question)(tiling) for _, tiling in self.tilings)), "")

    @property
    def operator(self) -> str:
        """Its name in tables."""
        if self.kind != "conv":
            return self.layout
        impl = self.implementation
        if impl is None:
            return f"dense {self.dense}"
        return f"sparse {impl.name}" if self.density < 1 else f"dense {impl.name}"


def default_implementation(layout: str) -> Impl | None:
    """The first implementation of a layout; None for a layout without any."""
    return next((impl for impl in candidates_for(OPERATOR) if impl.layout == layout), None)


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
        exchange: what several processes exchange of each parameter's gradient. It follows from the network,
            and is written again wherever the plan is used.
    """

    rule: str
    batch: int
    machine: Machine
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()
    activations: Activations = "parameters"
    exchange: tuple[Exchanged, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"the rule of a plan is {', '.join(RULES)}, not {self.rule!r}")
        if self.activations not in ACTIVATIONS:
            raise UserError(
                f"the activations of a plan are {' or '.join(ACTIVATIONS)}, not {self.activations!r}"
            )
        if self.activations != "bf16":
            for choice in self.choices:
                if clause := choice.about_tilings("needs_half"):
                    raise UserError(
                        f"{choice.layer} {clause}, which its plan does not keep: set the plan's activations "
                        "to bf16, or pairs of its tilings to false"
                    )

    def slow_here(self) -> dict[str, str]:
        """Convolutions that this machine runs slowly as they are cut, each with a clause that says why."""
        clauses = {choice.layer: choice.about_tilings("slow_here") for choice in self.choices}
        return {layer: clause for layer, clause in clauses.items() if clause}

    def blocked(self) -> list[Choice]:
        """List the choices outside the plain layout."""
        return [choice for choice in self.choices if choice.layout != PLAIN]

    def by_layer(self) -> dict[str, Choice]:
        """Choices by `Choice.layer`."""
        return {choice.layer: choice for choice in self.choices}

    def to_json(self) -> str:
        """As indented text; `from_json` is the inverse."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> LoweringPlan:
        """Read a plan, perhaps one that was edited by hand; a UserError says where it is none."""
        try:
            data = check.fields(json.loads(text), "a plan")
            entries = check.entries(data["choices"], "choices")
            choices = tuple(_choice(check.fields(one, "a choice")) for one in entries)
            notes = [check.text(note, "a note") for note in check.entries(data.get("notes", ()), "notes")]
            activations = data.get("activations", ACTIVATIONS[0])
            batch = check.whole(data["batch"], "batch", 1)
            rule, here = check.text(data["rule"], "rule"), check.fields(data["machine"], "machine")
            lanes, threads = check.whole(here["lanes"], "lanes"), check.whole(here["threads"], "threads", 1)
            gpu = None if here.get("gpu") is None else check.text(here["gpu"], "gpu")
            machine = Machine(check.text(here["cpu"], "cpu"), lanes, threads, gpu)
            exchange = exchanged_from(data.get("exchange", ()))
            return cls(rule, batch, machine, choices, tuple(notes), activations, exchange)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"this is no lowering plan: {type(error).__name__}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> LoweringPlan:
        """Read a plan from a file; a UserError names the file."""
        text = read_text(path)
        try:
            return cls.from_json(text)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def without(self, unusable: Mapping[str, str], apart: Collection[str] = ()) -> LoweringPlan:
        """The plan with unusable layers (name: reason) plain, and convolutions ``apart`` from their norms."""

        def changed(choice: Choice) -> Choice:
            if choice.layer in unusable and (choice.layout != PLAIN or choice.impl):
                refused = (*choice.refused, f"{choice.impl or choice.layout}: {unusable[choice.layer]}")
                return replace(choice, layout=PLAIN, impl="", tilings=(), refused=refused, statistics=False)
            return replace(choice, statistics=choice.statistics and choice.layer not in apart)

        return replace(self, choices=tuple(changed(choice) for choice in self.choices))

    def table(self) -> list[dict[str, str]]:
        """Rows for people, one a convolution; the same columns in each."""
        exchanged = {row.parameter.rpartition(".")[0]: row for row in self.exchange if row.how != HOWS[0]}
        return [
            {
                "layer": choice.layer,
                "shape": "x".join(map(str, choice.weight)),
                "image": "x".join(map(str, choice.image)),
                "density": f"{choice.density:.3f}",
                "operator": choice.operator,
                "tiling": _tilings(choice),
                "statistics": "taken" if choice.statistics else "",
                "exchanged": _exchanged(exchanged.get(choice.layer.partition("#")[0])),
                "predicted_ms": _ms(choice.predicted_ms),
                "measured_ms": _ms(choice.measured_ms),
                "refused": "; ".join(choice.refused),
            }
            for choice in self.choices
            if choice.kind == "conv"
        ]

    def operators(self) -> dict[str, str]:
        """Layer -> the operator that its convolution runs on."""
        return {choice.layer: choice.operator for choice in self.choices if choice.kind == "conv"}

    def __str__(self) -> str:
        rows = self.table()
        m = self.machine
        lines = [
            f"{self.rule} rule, {self.batch} images; "
            + (m.gpu or f"{m.cpu}, {m.lanes} lanes, {m.threads} threads")
            + ("; activations in bf16" if self.activations == "bf16" else ""),
            *self.notes,
        ]
        if rows:
            lines += table_lines([list(rows[0]), *(list(row.values()) for row in rows)])
        others = [choice for choice in self.choices if choice.kind != "conv"]
        blocked = sum(choice.layout != PLAIN for choice in others)
        lines.append(f"{blocked} of {len(others)} other operations run blocked")
        if self.exchange:
            lines.append(exchanged_line(self.exchange))
        return "\n".join(lines)


def _choice(entry: Mapping[str, Any]) -> Choice:
    layer = check.text(entry["layer"], "layer")
    tilings = []
    given = check.entries(entry.get("tilings", ()), f"tilings of {layer}")
    # Those of a layer that was edited to run plain have no effect, and are read as they were written.
    named = IMPLS.get(entry.get("impl") or "")
    impl = named or default_implementation(entry["layout"]) or candidates_for(OPERATOR)[0]
    for phase, tiling in given:
        if phase not in PHASES:
            raise UserError(f"{layer}: a phase is one of {', '.join(PHASES)}, not {phase!r}")
        if impl.read_tiling is None:
            raise UserError(f"{layer}: {impl.name} has no tilings")
        try:
            tilings.append((phase, impl.read_tiling(phase, tiling)))
        except UserError as error:
            raise UserError(f"{layer} {error}") from error
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
    if choice.implementation is None:
        return ""
    return ", ".join(str(tiling) for _, tiling in choice.tilings) or "by rule"


def _exchanged(row: Exchanged | None) -> str:
    return "all" if row is None else f"{row.sent} of {row.weights}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
