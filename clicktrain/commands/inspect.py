"""``clicktrain inspect RUN``: layer by layer, what a finished run left and what it costs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import JSON, OWN_MODEL, RUN, Command
from clicktrain.wording import short

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from clicktrain.train import LoadedRun

COMMAND = Command(
    name="inspect",
    description="Layer by layer: shape, density, kept weights, patterns, FLOPs, operator.",
    examples=(
        "clicktrain inspect runs/first",
        "clicktrain inspect runs/first --json",
    ),
    positional=RUN,
    groups={"this command": (OWN_MODEL, JSON)},
)

SHOWN_PATTERNS = 12
PIPE_WIDTH = 160
"""Columns where there is no terminal to fit."""


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = COMMAND.parse(argv)
    from clicktrain.train import load_run

    facts = describe(load_run(given["run"], given.get("model")))
    if given.get("json"):
        print(json.dumps(facts, indent=2))
    else:
        from clicktrain.commands.screen import PipeConsole

        console = PipeConsole()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = PIPE_WIDTH
        show(facts, console)
    return 0


def describe(loaded: LoadedRun) -> dict[str, Any]:
    """Describe a finished run as plain values, which `show` prints.

    ``pattern_counts`` of a layer: bits of the pattern (bit r*S+s = position (r, s) is kept) -> number of
    kernels; pruned kernels are not counted, and layers that were not pruned have none.
    """
    summary = loaded.summary
    layers = []
    for row in summary["layers"]:
        mask = loaded.masks.get(row["name"])
        f, c = (*row["shape"], 1)[:2]
        if mask is None or mask.dim() != 4:  # dense, or fully connected: weights without kernels
            counts, kept = {}, f * c
        else:
            counts, kept = pattern_counts(mask), int(mask.flatten(2).any(dim=2).sum())
        layers.append({**row, "kernels": f * c, "kernels_kept": kept, "pattern_counts": counts})
    keys = (
        "method", "model", "data", "epochs", "val_accuracy", "best_val_accuracy", "test_accuracy",
        "compression_asked", "sparsity_asked", "compression_ratio", "train_flops_ratio",
        "train_flops_ratio_nominal",
        "total_train_flops_ratio", "inference_flops_ratio", "parameters", "nonzero_parameters",
    )  # fmt: skip
    return {
        "run": str(loaded.folder.path),
        **{key: summary.get(key) for key in keys},
        "initial_train_flops": summary.get("initial_train_flops", 0),
        "layers": layers,
    }


def pattern_counts(mask: Tensor) -> dict[int, int]:
    """How many kernels of a mask [F, C, R, S] keep which positions; most used first, no pruned kernels."""
    import torch

    from clicktrain.sparsity.patterns import MAX_POSITIONS

    flat = mask.flatten(2).cpu()
    positions = flat.shape[2]
    if positions > MAX_POSITIONS:
        return {}
    bits = (flat.long() << torch.arange(positions)).sum(dim=2)
    values, counts = torch.unique(bits[bits != 0], return_counts=True)
    return dict(Counter(dict(zip(values.tolist(), counts.tolist(), strict=True))).most_common())


def show(facts: Mapping[str, Any], console: Console) -> None:
    """Print the table, the sums and the patterns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"{facts['run']}: {facts['model']}, method {facts['method']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    heads = ("shape", "density", "per\nfilter", "kernels\nkept", "patterns\n(top)", "dense\nFLOPs", "now")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("operator", min_width=9)
    for row in facts["layers"]:
        per_filter = row["nnz_per_filter"]
        table.add_row(
            row["name"],
            "x".join(map(str, row["shape"])),
            f"{row['density']:.3f}",
            "varies" if per_filter is None else str(per_filter),
            f"{100 * row['kernels_kept'] / row['kernels']:.0f}%" if row["pattern_counts"] else "",
            _pattern_use(row["pattern_counts"]),
            short(row["forward_flops_dense"]),
            short(row["forward_flops"]),
            str(row["operator"]),
        )
    console.print(table)
    for line in (*_sums(facts), *_pictures(facts["layers"])):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _sums(facts: Mapping[str, Any]) -> list[str]:
    accuracy = "-" if facts["val_accuracy"] is None else f"{facts['val_accuracy']:.2f}%"
    kept = f"{facts['nonzero_parameters']:,} of {facts['parameters']:,} parameters are not zero"
    flops = f"inference FLOPs {100 * facts['inference_flops_ratio']:.1f}% of dense"
    return [
        f"{asked_and_reached(facts)}; {kept}",
        f"{flops}, {training_share(facts, 1)}; accuracy {accuracy}",
    ]


def _pattern_use(counts: Mapping[int, int]) -> str:
    """Number of different patterns, and the share of the kept kernels that has the most used one."""
    if not counts:
        return ""
    return f"{len(counts)} ({100 * max(counts.values()) / sum(counts.values()):.0f}%)"


def _pictures(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The most used 3x3 patterns of the network side by side, with their shares of the kept kernels."""
    total: Counter[int] = Counter()
    for row in layers:
        if row["shape"][2:] == [3, 3]:
            total.update(row["pattern_counts"])
    if not total:
        return []
    best = total.most_common(SHOWN_PATTERNS)
    cells = [
        [*("".join(" #" if bits >> (3 * r + s) & 1 else " ." for s in range(3)) for r in range(3)),
         f"{100 * count / total.total():.1f}%".rjust(6)]
        for bits, count in best
    ]  # fmt: skip
    shown = f", the first {len(best)}" if len(total) > len(best) else ""
    head = f"patterns of the 3x3 kernels ({len(total)} in use{shown}):"
    return [head, *("   ".join(cell[line] for cell in cells) for line in range(4))]


def training_share(summary: Mapping[str, Any], digits: int) -> str:
    """Training FLOPs of a run over dense training, and with those of the weights that it started from."""
    text = f"training FLOPs {100 * summary['train_flops_ratio']:.{digits}f}% of dense"
    nominal = summary.get("train_flops_ratio_nominal")
    if nominal is not None and abs(nominal - summary["train_flops_ratio"]) >= 0.005:
        text += f" ({100 * nominal:.{digits}f}% nominal)"
    earlier = summary.get("initial_train_flops", 0)
    if earlier is None:
        return f"{text}, its initial weights not counted"
    if earlier == 0:
        return text
    return f"{text}, {100 * summary['total_train_flops_ratio']:.{digits}f}% with its initial weights"


def asked_and_reached(summary: Mapping[str, Any]) -> str:
    """The compression of a run beside what was asked for."""
    asked, sparsity = summary.get("compression_asked"), summary.get("sparsity_asked")
    if asked is not None:
        wish = f"compression asked {asked:g}x"
    elif sparsity is not None:
        wish = f"sparsity asked {100 * sparsity:g}% ({1 / (1 - sparsity):.3g}x)"
    elif any(target.get("asked") is not None for target in summary.get("outcome") or ()):
        wish = "compression not asked"
    else:
        wish = "no compression asked"
    return f"{wish}, reached {summary['compression_ratio']:.2f}x"
