"""Export as C: a folder with the weights and all that runs them, built and compared before it is kept."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.export.checked_export import RELATIVE, FinishedRun
from clicktrain.inference.capture import capture
from clicktrain.inference.program import Program
from clicktrain.inference.runtime_files import filled, renamed, runtime_file, runtime_texts
from clicktrain.inference.tables import constants, frequent_sets, model_source
from clicktrain.inference.weight_file import WeightFile
from clicktrain.leftovers import remove_abandoned

Images = Iterable[tuple[Tensor, Tensor | None]]
"""Batches of normalized images [N, C, H, W] and their classes [N], None where these are unknown."""

_TEMPLATES = ("model.h", "Makefile", "CMakeLists.txt", "model.py", "example.cpp", "example.rs", "README.md")
_STORED_FLOATS = 2**18
_MARK = "// Written by clicktrain"
_RANDOM = (1, 3, 40)
"""Batches of random images where there are none."""


@dataclass(frozen=True, slots=True)
class ExportedC:
    """A folder that was written, built and compared on ``images`` images.

    Attributes:
        weight_bytes: of ``weights.bin``.
        dense_bytes: of the network's parameters and buffers in float32.
        max_difference: largest difference of the results to the network's; at most ``tolerance``.
        accuracy: percent, of the C code, and of the network in ``network_accuracy``; None without classes.
        isa: instructions that it ran with.
        memory_bytes: that a program needs for one image at a time.
    """

    path: Path
    weight_bytes: int
    dense_bytes: int
    max_difference: float
    tolerance: float
    images: int
    accuracy: float | None
    network_accuracy: float | None
    isa: str
    memory_bytes: int


def export_c(
    run: FinishedRun, output: str | Path, images: Images | None = None, name: str = "model"
) -> ExportedC:
    """Write the network of a run as C into the folder ``output``; an earlier export there is replaced.

    It is compiled, and its results are compared with the network's on ``images`` (random numbers without
    any), before the folder gets its name.

    Args:
        name: of its files, functions and library: a program may hold several networks.

    Raises:
        UserError: the network has an operation that there is no C for, there is no C compiler, the folder
            holds something else, or the C code does not compute what the network does. Nothing is written
            then.
    """
    output = Path(output)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"name is {name!r}: use small letters, digits and underscores, such as resnet18")
    _check_target(output, name)
    model = run.model.eval()
    program = capture(model, run.image_shape)
    try:
        remove_abandoned(output.parent, r"\.export-(?P<pid>\d+)-.*")
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".export-{os.getpid()}-")
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror}") from None
    with folder as place, torch.no_grad():
        draft = Path(place) / "c"
        draft.mkdir()
        batches = _batches(images, run.image_shape)
        first = next(batches)
        done = write_c(model, program, draft, run.facts, first[0], name)
        compared = _compared(model, draft, name, _chained(first, batches), Path(place))
        difference, tolerance = compared.difference, RELATIVE * max(compared.scale, 1.0)
        if not difference <= tolerance:  # also when it is nan
            raise UserError(
                f"the C code does not compute what the network does (largest difference {difference:.3g}, "
                f"allowed {tolerance:.3g}): nothing was written"
            )
        if output.exists():
            shutil.rmtree(output)
        draft.rename(output)
    dense = sum(tensor.numel() * 4 for tensor in model.state_dict().values() if tensor.is_floating_point())
    right, theirs = (
        None if n is None else 100 * n / compared.images for n in (compared.right, compared.network_right)
    )
    return ExportedC(
        output,
        done,
        dense,
        difference,
        tolerance,
        compared.images,
        right,
        theirs,
        compared.isa,
        compared.memory,
    )


def write_c(
    model: nn.Module,
    program: Program,
    folder: Path,
    facts: Mapping[str, Any],
    images: Tensor,
    name: str = "model",
) -> int:
    """Write all files of a program into an empty folder, without building or comparing; bytes of the weights.

    ``images``, at least one, are kept for the self-test, with what ``model``, which the program is of, makes
    of them in float64.
    """
    weights = WeightFile()
    source, fingerprint = model_source(program, weights, facts)
    (folder / "weights.bin").write_bytes(weights.finish(fingerprint))
    texts = {
        **runtime_texts(),
        "model.c": source,
        "sets.h": frequent_sets(program),
        "check.c": runtime_file("check.c"),
    }
    values = _values(program, facts, weights.size)
    texts |= {target: filled(runtime_file(f"{target}.in"), values) for target in _TEMPLATES}
    for target, text in texts.items():
        (folder / renamed(target, name)).write_text(renamed(text, name), encoding="utf-8")
    few = images[: max(1, _STORED_FLOATS // max(images[0].numel(), 1))][:8]
    (folder / "check.bin").write_bytes(_check_file(model, few))
    return weights.size


def _values(program: Program, facts: Mapping[str, Any], weight_bytes: int) -> dict[str, str]:
    channels = program.input.shape[0]
    mean, std = (
        [float(v) for v in facts.get(key) or ()] or [default] * channels
        for key, default in (("mean", 0.0), ("std", 1.0))
    )
    model = str(facts.get("model") or "a network").rpartition(":")[2]
    c, h, w = program.input.shape
    return {
        "CONSTANTS": constants(program),
        "SHAPE": repr(program.input.shape),
        "RESULTS": str(program.output.size),
        "IMAGE": f"{c} * {h} * {w}",
        "CLASSES": repr([str(one) for one in facts.get("classes") or ()]),
        "MEAN": repr(mean),
        "DEVIATION": repr(std),
        "WEIGHTS": f"{weight_bytes / 2**20:.2f} MB",
        "TITLE": f"{model}, trained and pruned with clicktrain: {program.multiply_adds() / 1e6:.1f} million "
        "multiply-adds an image.",
    }


@torch.no_grad()
def _check_file(model: nn.Module, images: Tensor) -> bytes:
    """Images and results for ``check.c``."""
    results: Tensor = copy.deepcopy(model).double()(images.double()).flatten(1)
    scale = max(float(results.abs().max()), 1.0) if bool(results.isfinite().all()) else 1.0
    head = struct.pack("<8siid", b"CTCHECK1", len(images), 0, RELATIVE * scale)
    parts = images.float().numpy().astype("<f4"), results.numpy().astype("<f8")
    return b"".join([head, *(bytes(part.tobytes()) for part in parts)])


@dataclass(slots=True)
class _Compared:
    difference: float = 0.0
    scale: float = 0.0
    images: int = 0
    right: int | None = None
    network_right: int | None = None
    isa: str = ""
    memory: int = 0


def _compared(model: nn.Module, folder: Path, name: str, batches: Images, scratch: Path) -> _Compared:
    """Build the folder's library elsewhere and run both on all images."""
    module = load_module(folder / f"{name}.py")
    try:
        library = module.build(scratch)
    except (RuntimeError, OSError) as error:
        raise UserError(f"the C code cannot be checked: {error}") from None
    network = module.Network(library=library)
    found = _Compared(isa=network.isa)
    for x, y in batches:
        expected = model(x).flatten(1).double()
        got = torch.from_numpy(network(x.numpy())).double()
        worst = float((got - expected).abs().max())
        found.difference = max(found.difference, worst) if worst == worst else worst
        found.scale = max(found.scale, float(expected.abs().max()))
        found.images += len(x)
        if y is not None:
            found.right = (found.right or 0) + int((got.argmax(1) == y).sum())
            found.network_right = (found.network_right or 0) + int((expected.argmax(1) == y).sum())
        if found.difference != found.difference:
            break
    network.close()
    one = module.Network(max_batch=1, library=library)
    found.memory = int(one.memory)
    one.close()
    return found


def load_module(path: Path) -> ModuleType:
    """Import a Python file that an export wrote."""
    spec = importlib.util.spec_from_file_location(f"clicktrain_exported_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _batches(images: Images | None, shape: tuple[int, int, int]) -> Iterator[tuple[Tensor, Tensor | None]]:
    if images is not None:
        found = False
        for x, y in images:
            found = True
            yield x.float(), y
        if found:
            return
    generator = torch.Generator().manual_seed(0)
    for count in _RANDOM:
        yield torch.randn(count, *shape, generator=generator), None


def _chained(first: tuple[Tensor, Tensor | None], rest: Images) -> Iterator[tuple[Tensor, Tensor | None]]:
    yield first
    yield from rest


def _check_target(output: Path, name: str) -> None:
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}: make it or give another folder")
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file: give the name of a folder")
    if not any(output.iterdir()):
        return
    sources = [path for path in output.glob("*.c") if (output / "weights.bin").exists()]
    if not any(path.read_text(encoding="utf-8", errors="replace").startswith(_MARK) for path in sources):
        raise UserError(f"{output} holds something else than an export: give another folder")
