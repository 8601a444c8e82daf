"""Check and measure everything that wants a GPU, piece by piece; what is done already is not done again.

python scripts/gpu.py [--out FOLDER] [--seconds 500] [--list]

Each piece writes FOLDER/NAME.json; a piece that fails writes what failed, and the next one goes on. No piece
begins after ``--seconds``. The most valuable come first. Needs PyTorch with CUDA and Triton, and no network.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clicktrain.bench.conv import SHAPES, Shape
from clicktrain.bench.gpu import GpuCase, bench_case, need_gpu
from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.latency.machine import describe

BATCH = 256
_SMALL = (Shape(7, 5, 9, 6, 3), Shape(64, 96, 8, 8, 64), Shape(33, 130, 5, 7, 40))
_LARGE = tuple(Shape(s.channels, s.filters, s.height, s.width, BATCH) for s in SHAPES)
_RESNET50 = tuple(Shape(c, c, size, size, BATCH) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7)))


def cases() -> dict[str, list[GpuCase]]:
    """Pieces, in their order: correctness on odd shapes, then the eight shapes by structure."""
    wide, narrow = ([s for s in _LARGE if (s.channels >= 256) == large] for large in (True, False))
    pieces: dict[str, list[GpuCase]] = {
        "checks": [
            GpuCase(shape, compression, filters, channels, precision)
            for shape in _SMALL
            for compression, filters, channels in ((4.0, 16, 1), (10.0, 1, 1))
            for precision in ("bf16", "tf32", "fp32")
        ]
    }
    for label, shapes in (("wide", wide), ("narrow", narrow)):
        for compression, filters, channels, precision in (
            (10.0, 64, 1, "bf16"),
            (10.0, 64, 64, "bf16"),
            (10.0, 1, 1, "fp32"),
            (4.0, 64, 1, "bf16"),
            (10.0, 128, 1, "bf16"),
            (10.0, 64, 1, "tf32"),
        ):
            name = f"{label}-{compression:g}x-{filters}x{channels}-{precision}"
            pieces[name] = [GpuCase(shape, compression, filters, channels, precision) for shape in shapes]
    return pieces


def run(name: str, piece: list[GpuCase], path: Path, out_of_time: Callable[[], bool]) -> bool:
    """Run what is missing of a piece and write it after every layer; whether it is complete."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows, failed = known.get("rows", {}), known.get("failed", {})
    for case in piece:
        if case.name() in rows:
            continue
        if out_of_time():
            return False
        try:
            rows[case.name()] = [row.to_json() for row in bench_case(case)]
            failed.pop(case.name(), None)
            best = ", ".join(
                f"{row['phase']} {row['ratio']:.2f}x (predicted {row['predicted_ratio']:.2f}x)"
                if row["ratio"] is not None
                else f"{row['phase']}: no tile"
                for row in rows[case.name()]
            )
            print(f"{name}: {case.name()}: {best}", flush=True)
        except Exception as error:  # the other layers are worth their time all the same
            failed[case.name()] = traceback.format_exc()
            print(f"{name}: {case.name()}: {type(error).__name__}: {error}", flush=True)
        document = {"machine": describe(torch.device("cuda")), "rows": rows, "failed": failed}
        write_text_atomic(path, json.dumps(document, indent=1))
    return not failed


def main(arguments: list[str] | None = None) -> int:
    """Run the pieces; 1 if something failed, 2 without a GPU, 3 if time ran out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--list", action="store_true", help="names of the pieces and how much they have")
    options = parser.parse_args(arguments)
    pieces = cases()
    if options.list:
        for name, piece in pieces.items():
            print(f"{name}: {len(piece)} layers")
        return 0
    try:
        need_gpu()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    complete = True
    for name, piece in pieces.items():
        complete &= run(name, piece, options.out / f"{name}.json", lambda: time.monotonic() > end)
        if time.monotonic() > end:
            print("out of time: run it again to go on", flush=True)
            return 3
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
