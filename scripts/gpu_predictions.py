"""Write the predictions of docs/gpu.md, of the roofline model for a GPU that need not be there.

python scripts/gpu_predictions.py [--check] [--only TEXT]

A table follows ``<!-- predicted: COMPRESSION, FILTERS x CHANNELS, DTYPE -->`` up to ``<!-- end -->``.
``--only`` takes the rows whose first cell has a text and leaves the others as they are. None of this is
measured.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from pathlib import Path

import torch

from clicktrain.bench.conv import SHAPES, Shape
from clicktrain.bench.masks import pattern_mask
from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import PHASES, ConvProblem
from clicktrain.kernels.sparse_conv2d.impl.triton import predicted

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"
BATCH = 256
_TABLE = re.compile(
    r"(<!-- predicted: ([\d.]+)x, (\d+) x (\d+), (bfloat16|float32) -->\n)(.*?)(<!-- end -->)", re.DOTALL
)
_HEAD = "| C=F @ HxW | dense µs | forward | dgrad | wgrad |\n|---|---|---|---|---|\n"


def name_of(shape: Shape) -> str:
    """The first cell of a row."""
    return f"{shape.channels} @ {shape.height}x{shape.width}"


def row(shape: Shape, compression: float, filters: int, channels: int, dtype: str) -> tuple[str, list[float]]:
    """A row of the table, and its three ratios."""
    f, c = shape.filters, shape.channels
    channels = min(channels, c)
    generator = torch.Generator().manual_seed(0)
    mask = pattern_mask((f, c // channels, 3, 3), compression, filters, generator)
    structure = Structure.from_mask(mask.repeat_interleave(channels, 1))
    problem = ConvProblem.of_structure(
        structure, (shape.height, shape.width), BATCH, padding=(1, 1), activations=dtype, device="cuda"
    )
    cells, ratios = [], []
    for phase in PHASES:
        one = predicted(phase, structure, problem, "rows" if dtype == "float32" else "blocks")
        ratios.append(one.dense_seconds / one.seconds)
        cells.append(f"{one.seconds * 1e6:.0f} µs, {ratios[-1]:.2f}x, {one.limit}, `{one.tile}`")
        dense = one.dense_seconds
    return f"| {name_of(shape)} | {dense * 1e6:.0f} | {' | '.join(cells)} |", ratios


def rebuilt(text: str, only: str = "") -> str:
    """A page with its tables, or some of their rows, computed again."""

    def table(match: re.Match[str]) -> str:
        compression, filters, channels, dtype = float(match[2]), int(match[3]), int(match[4]), match[5]
        known = {line.split("|")[1].strip(): line for line in match[6].splitlines() if line.startswith("| ")}
        lines, ratios = [], []
        for shape in SHAPES:
            name = name_of(shape)
            if only and only not in name:
                lines.append(known[name])
                continue
            line, own = row(shape, compression, filters, channels, dtype)
            lines.append(line)
            ratios.append(own)
        means = known.get("geometric mean", "")
        if not only:
            of_phase = (statistics.geometric_mean(one) for one in zip(*ratios, strict=True))
            means = f"| geometric mean | | {' | '.join(f'{mean:.2f}x' for mean in of_phase)} |"
            assert all(map(math.isfinite, (ratio for own in ratios for ratio in own)))
        return match[1] + _HEAD + "\n".join([*lines, means]) + "\n" + match[7]

    return _TABLE.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the page, or compare it with what the model says now."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", default="", help="rows whose first cell has this text")
    options = parser.parse_args(arguments)
    before = PAGE.read_text(encoding="utf-8")
    after = rebuilt(before, options.only)
    if not options.check:
        PAGE.write_text(after, encoding="utf-8")
    elif before != after:
        print("docs/gpu.md is stale: run python scripts/gpu_predictions.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
