"""Check and measure everything that wants a GPU, piece by piece; what is done already is not done again.

python scripts/gpu.py [--out FOLDER] [--seconds 500] [--only PIECE] [--data parquet:DIR] [--dry] [--list]

Each piece writes FOLDER/NAME.json, and all of them FOLDER/gpu.md; a case that fails writes what failed, and
the next one goes on. Nothing begins after ``--seconds``: a second call goes on. The most valuable come first.
Needs PyTorch with CUDA and Triton, and no network.

``--dry`` runs the same pieces on a CPU, on the smallest shapes and networks, in Triton's interpreter
(TRITON_INTERPRET=1): everything is built and checked, nothing is timed, and no figure is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clicktrain.bench.conv import SHAPES, Shape
from clicktrain.bench.gpu import GpuCase, bench_case, dry_device, need_gpu
from clicktrain.bench.gpu_network import (
    GpuStep,
    bench_conversion,
    bench_gpu_step,
    bench_norm,
    short_run,
)
from clicktrain.bench.gpu_page import page
from clicktrain.errors import UserError
from clicktrain.files import is_file
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.latency.machine import describe

BATCH = 256
EPOCHS = 8
_SMALL = (Shape(7, 5, 9, 6, 3), Shape(64, 96, 8, 8, 64), Shape(33, 130, 5, 7, 40))
_LARGE = tuple(Shape(s.channels, s.filters, s.height, s.width, BATCH) for s in SHAPES)
_RESNET50 = tuple(
    Shape(c, f, size, size, BATCH)
    for wide, narrow, size in ((256, 64, 56), (512, 128, 28), (1024, 256, 14), (2048, 512, 7))
    for c, f in ((wide, narrow), (narrow, wide))
)
"""Its convolutions of 1x1; those of 3x3 are among the eight shapes."""
_DRY = Shape(4, 8, 3, 3, 8)
_STRUCTURES = (
    (10.0, 64, 1, "bf16"),
    (10.0, 64, 64, "bf16"),
    (10.0, 1, 1, "fp32"),
    (4.0, 64, 1, "bf16"),
    (10.0, 128, 1, "bf16"),
    (10.0, 64, 1, "tf32"),
)
"""Compression, filters and channels that share kernels, and precision, the most valuable first."""

Job = Callable[[], list[dict[str, Any]]]
"""What measures one case, and gives its rows; none where time ran out."""


def layers(cases: list[GpuCase], dry: bool) -> dict[str, Job]:
    """Layers beside cuDNN; dry, one small layer of each structure."""
    if dry:
        small = [
            dataclasses.replace(c, shape=_DRY, filters=min(c.filters, 4), channels=min(c.channels, 2))
            for c in cases
        ]
        cases = list(
            {(c.compression, c.filters, c.channels, c.precision, c.kernel): c for c in small}.values()
        )
    return {
        case.name(): lambda case=case: [row.to_json() for row in bench_case(case, dry=dry)]  # type: ignore[misc]
        for case in cases
    }


def pieces(data: str, out: Path, dry: bool, out_of_time: Callable[[], bool]) -> dict[str, dict[str, Job]]:
    """All pieces, in their order: correctness on odd shapes first."""
    wide, narrow = ([s for s in _LARGE if (s.channels >= 256) == large] for large in (True, False))

    def structured(shapes: list[Shape], *structure: Any, kernel: int = 3) -> dict[str, Job]:
        return layers([GpuCase(shape, *structure, kernel=kernel) for shape in shapes], dry)

    def name(structure: tuple[Any, ...]) -> str:
        compression, filters, channels, precision = structure
        return f"{compression:g}x-{filters}x{channels}-{precision}"

    checks = [
        GpuCase(shape, compression, filters, channels, precision)
        for shape in _SMALL
        for compression, filters, channels in ((4.0, 16, 1), (10.0, 1, 1))
        for precision in ("bf16", "tf32", "fp32")
    ]
    first, *rest = _STRUCTURES
    networks = [
        GpuStep("resnet18", 256, 32, 10.0, 64, 64),
        GpuStep("resnet18", 256, 32, 10.0, 64),
        GpuStep("resnet50", 64, 224, 10.0, 64, 64),
        GpuStep("resnet18", 256, 32, 4.0, 64),
    ]
    weights = [(256, 128), (512, 512)]
    norms = list(_LARGE)
    if dry:
        networks = [GpuStep("resnet8", 8, 8, 4.0, 4, 2, width=0.25)]
        weights, norms = [(8, 4)], [_DRY]
    runs = {method: recipe_of(method, data, dry) for method in ("dense", "clicktrain")}
    return {
        "checks": layers(checks, dry),
        f"wide-{name(first)}": structured(wide, *first),
        "steps": {case.name(): partial(bench_gpu_step, case, dry=dry) for case in networks},
        **{f"wide-{name(one)}": structured(wide, *one) for one in rest[:3]},
        "conversion": {f"{f}x{c}": partial(bench_conversion, f, c, dry=dry) for f, c in weights},
        "norms": {str(shape): partial(bench_norm, shape, dry=dry) for shape in norms},
        "accuracy": {
            method: partial(short_run, recipe, out / "runs" / method, out_of_time, dry=dry)
            for method, recipe in runs.items()
        },
        "resnet50-1x1": structured(list(_RESNET50), *_STRUCTURES[1], kernel=1),
        **{f"wide-{name(one)}": structured(wide, *one) for one in rest[3:]},
        **{f"narrow-{name(one)}": structured(narrow, *one) for one in _STRUCTURES},
    }


def recipe_of(method: str, data: str, dry: bool) -> dict[str, Any]:
    """Short training of cifarnet (recipes/cifarnet.yaml), dense or with ClickTrain at 8x."""
    recipe: dict[str, Any] = {
        "model": "cifarnet", "data": data, "augment": "cifarnet", "epochs": EPOCHS, "batch_size": 512,
        "learning_rate": 1.5, "learning_rate_batch": 1024, "momentum": 0.85, "weight_decay": 0.0013,
        "bias_rate_factor": 64, "schedule": "triangular", "label_smoothing": 0.2, "precision": "bf16",
        "channels_last": True, "evaluate_every": EPOCHS, "method": method, "workers": 0,
    }  # fmt: skip
    if method == "clicktrain":
        recipe |= {"compression": 8.0, "group": 32}
    if dry:
        recipe |= {
            "model": "resnet8", "width": 0.125, "data": "synthetic:classes=4,size=8,train=64,val=8",
            "augment": "none", "batch_size": 8, "epochs": 2, "evaluate_every": 2, "learning_rate": 0.01,
            "bias_rate_factor": 1, "precision": "fp32", "threads": 1, "operators": "reference",
            "channels_last": False,
        }  # fmt: skip
        recipe |= {"group": 2} if method == "clicktrain" else {}
    return recipe


def run(
    name: str, jobs: Mapping[str, Job], path: Path, out_of_time: Callable[[], bool], dry: bool = False
) -> bool:
    """Run what is missing of a piece and write it after every case; whether it is complete."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if is_file(path) else {}
    if known and known.get("dry", False) != dry:
        raise UserError(f"{path} is of {'a measurement' if dry else 'a dry run'}: give another --out")
    rows, failed = known.get("rows", {}), known.get("failed", {})
    for case, job in jobs.items():
        if case in rows:
            continue
        if out_of_time():
            return False
        try:
            if not (own := job()):
                return False
            rows[case] = own
            failed.pop(case, None)
            print(f"{name}: {case}: {', '.join(map(said, own))}", flush=True)
        except Exception as error:  # the other cases are worth their time all the same
            failed[case] = traceback.format_exc()
            print(f"{name}: {case}: {type(error).__name__}: {error}", flush=True)
        machine = describe(torch.device("cpu" if dry else "cuda"))
        document = {"machine": machine, "dry": dry, "rows": rows, "failed": failed}
        write_text_atomic(path, json.dumps(document, indent=1))
    return not failed


def said(row: Mapping[str, Any]) -> str:
    """A row, in a clause."""
    what = row.get("phase", "")
    if row.get("val_accuracy") is not None:
        return f"accuracy {row['val_accuracy']:.2f} in {row['seconds']:.0f} s"
    if row.get("ratio") is None:
        return f"{what} checked".strip()
    predicted = f" (predicted {row['predicted_ratio']:.2f}x)" if "predicted_ratio" in row else ""
    return f"{what} {row['ratio']:.2f}x{predicted}".strip()


def main(arguments: list[str] | None = None) -> int:
    """Run the pieces; 1 if something failed, 2 without a GPU, 3 if time ran out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=None, help="by default runs/gpu, dry: runs/gpu-dry")
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--data", default="parquet:../shared/data/cifar10", help="of the pair of short runs")
    parser.add_argument("--only", default="", help="pieces whose name has this text")
    parser.add_argument("--dry", action="store_true", help="build and check on a CPU, time nothing")
    parser.add_argument("--list", action="store_true", help="names of the pieces and how much they have")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    out: Path = options.out or Path("runs/gpu-dry" if options.dry else "runs/gpu")

    def out_of_time() -> bool:
        return time.monotonic() > end

    every = pieces(options.data, out, options.dry, out_of_time)
    chosen = {name: jobs for name, jobs in every.items() if options.only in name}
    if options.list:
        for name, jobs in chosen.items():
            print(f"{name}: {len(jobs)} cases")
        return 0
    try:
        dry_device() if options.dry else need_gpu()
        if not chosen:
            raise UserError(f"no piece has {options.only!r} in its name: --list names them")
        complete = True
        for name, jobs in chosen.items():
            out.mkdir(parents=True, exist_ok=True)
            complete &= run(name, jobs, out / f"{name}.json", out_of_time, options.dry)
            write_text_atomic(out / "gpu.md", page(out))
            if out_of_time():
                print("out of time: run it again to go on", flush=True)
                return 3
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
