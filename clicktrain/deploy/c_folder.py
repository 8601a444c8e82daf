"""Export as C: a folder with the weights and all that runs them, built and compared before it is kept."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.deploy.checked_export import FinishedRun, drafts_beside
from clicktrain.deploy.comparison import RELATIVE, Comparison, Images, batches, compare
from clicktrain.errors import UserError
from clicktrain.inference.calibration import calibrate
from clicktrain.inference.capture import capture
from clicktrain.inference.program import Program, Value
from clicktrain.inference.runtime_files import filled, renamed, runtime_file, runtime_texts
from clicktrain.inference.tables import constants, frequent_sets, model_source
from clicktrain.inference.weight_file import WeightFile

INT8 = "avx512-int8"
"""Instructions that int8 layers run with."""
_INT8_COARSER = 3000
"""Allowed difference over that of float32, as in ``check.c``: 30% of the largest logit."""
_TEMPLATES = ("model.h", "Makefile", "CMakeLists.txt", "model.py", "example.cpp", "example.rs", "README.md")
_STORED_FLOATS = 2**18
_MARK = "// Written by clicktrain"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedC(Comparison):
    """A folder that was written, built and compared.

    Attributes:
        weight_bytes: of ``weights.bin``.
        dense_bytes: of the network's parameters and buffers in float32.
        isa: instructions that it ran with.
        memory_bytes: that a program needs for one image at a time.
        int8: of the same images, computed with int8 numbers; None if that was not asked for, or cannot be
            run on this processor.
        int8_layers: convolutions that can be.
        int8_used: of these, those that are, by rules, one image at a time and in batches.
    """

    path: Path
    weight_bytes: int
    dense_bytes: int
    isa: str
    memory_bytes: int
    int8: Comparison | None = None
    int8_layers: int = 0
    int8_used: tuple[int, int] = (0, 0)

    def sentences(self, images: str = "images") -> list[str]:
        """What was written and how it was checked."""
        lines = [
            f"{self.path}: weights {self.weight_bytes / 2**20:.2f} MB "
            f"(dense {self.dense_bytes / 2**20:.2f} MB), "
            f"memory for one image at a time {self.memory_bytes / 2**20:.2f} MB",
            f"built and run ({self.isa}) on {self.images} {images}: {self.sentence()}",
        ]
        if self.int8_layers and self.int8 is None:
            lines.append(
                f"{self.int8_layers} layers can be int8, which was not run: {INT8} is not available here"
            )
        elif self.int8 is not None:
            difference = f"largest difference {self.int8.max_difference:.2g}"
            if self.int8.accuracy is not None and self.int8.network_accuracy is not None:
                difference += (
                    f", accuracy {self.int8.accuracy:.2f}%, the network's {self.int8.network_accuracy:.2f}%"
                )
            lines.append(
                f"{self.int8_layers} layers can be int8, {self.int8_used[0]} are for one image and "
                f"{self.int8_used[1]} in batches; run ({INT8}) on {self.int8.images} {images}: {difference}"
            )
        return lines

    def __str__(self) -> str:
        return "\n".join(self.sentences())


def export_c(
    run: FinishedRun,
    output: str | Path,
    images: Images | None = None,
    name: str = "model",
    calibration: Iterable[Tensor] | None = None,
) -> ExportedC:
    """Write the network of a run as C into the folder ``output``; an earlier export there is replaced.

    It is compiled, and its results are compared with the network's on ``images`` (random numbers without
    any), before the folder gets its name.

    Args:
        name: of its files, functions and library: a program may hold several networks.
        calibration: batches [N, C, H, W] on which the ranges of int8 numbers are found; none without any.

    Raises:
        UserError: the network has an operation that there is no C for, there is no C compiler, the folder
            holds something else, or the C code does not compute what the network does. Nothing is written
            then.
    """
    output = Path(output)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"name is {name!r}: use small letters, digits and underscores, such as resnet18")
    if len(run.image_shape) != 3:
        raise UserError(
            f"the network takes inputs of shape [N, {', '.join(map(str, run.image_shape))}]: C has images "
            "[N, C, H, W] only"
        )
    _check_target(output, name)
    model = run.model.eval()
    program = capture(model, run.image_shape)
    with drafts_beside(output) as place, torch.no_grad():
        draft = place / "c"
        draft.mkdir()
        ranges = {} if calibration is None else calibrate(program, _of_shape(calibration, run.image_shape))
        found = batches(images, run.image_shape)
        few = list(itertools.islice(found, 2))  # the first image, and others
        stored = torch.cat([x for x, _ in few])
        rest = list(found) if calibration is not None else found  # gone through twice with int8
        weight_bytes, int8_layers = write_c(model, program, draft, run.facts, stored, name, ranges)
        if calibration is not None and not int8_layers:
            raise UserError(
                "nothing of this network can be int8: that is for sparse 1x1 and 3x3 convolutions whose "
                "inputs are never negative, as after ReLU"
            )
        with _built(draft, name, place) as built:
            compared = compare(
                lambda x: model(x).flatten(1),
                lambda x: torch.from_numpy(built.network(x.numpy())),
                itertools.chain(few, rest),
            )
            isa = str(built.network.isa)
            int8, used = None, (0, 0)
            if int8_layers and INT8 in built.module.instructions(built.library):
                int8, used = _compared_int8(built, model, itertools.chain(few, rest))
        compared.check("the C code")
        if int8 is not None:
            replace(int8, tolerance=_INT8_COARSER * int8.tolerance).check("the C code with int8 numbers")
        if output.exists():
            shutil.rmtree(output)
        draft.rename(output)
    dense = sum(tensor.numel() * 4 for tensor in model.state_dict().values() if tensor.is_floating_point())
    return ExportedC(
        path=output,
        weight_bytes=weight_bytes,
        dense_bytes=dense,
        isa=isa,
        memory_bytes=built.memory,
        int8=int8,
        int8_layers=int8_layers,
        int8_used=used,
        max_difference=compared.max_difference,
        tolerance=compared.tolerance,
        images=compared.images,
        accuracy=compared.accuracy,
        network_accuracy=compared.network_accuracy,
    )


def write_c(
    model: nn.Module,
    program: Program,
    folder: Path,
    facts: Mapping[str, Any],
    images: Tensor,
    name: str = "model",
    ranges: Mapping[Value, float] = MappingProxyType({}),
) -> tuple[int, int]:
    """Write all files of a program into an empty folder, without building or comparing.

    Returns the bytes of the weights and the number of layers that can be int8, by ``ranges`` of `calibrate`.
    ``images``, at least one, are kept for the self-test, with what ``model``, which the program is of, makes
    of them in float64.
    """
    weights = WeightFile()
    source, fingerprint = model_source(program, weights, facts, ranges)
    int8_layers = source.count(".most = ")
    (folder / "weights.bin").write_bytes(weights.finish(fingerprint))
    texts = {
        **runtime_texts(),
        "model.c": source,
        "sets.h": frequent_sets(program, int8=int8_layers > 0),
        "check.c": runtime_file("check.c"),
    }
    values = _values(program, facts, weights.size)
    texts |= {target: filled(runtime_file(f"{target}.in"), values) for target in _TEMPLATES}
    for target, text in texts.items():
        (folder / renamed(target, name)).write_text(renamed(text, name), encoding="utf-8")
    few = images[: max(1, _STORED_FLOATS // max(images[0].numel(), 1))][:8]
    (folder / "check.bin").write_bytes(_check_file(model, few))
    return weights.size, int8_layers


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


@dataclass(frozen=True, slots=True)
class _Built:
    """A library, the Python file that loads it, a network of it, bytes that one image at a time needs."""

    module: ModuleType
    library: Path
    network: Any
    memory: int


@contextlib.contextmanager
def _built(folder: Path, name: str, scratch: Path) -> Iterator[_Built]:
    """The folder's network, built elsewhere."""
    module = load_module(folder / f"{name}.py")
    try:
        library = module.build(scratch)
    except (RuntimeError, OSError) as error:
        raise UserError(f"the C code cannot be checked: {error}") from None
    one = module.Network(max_batch=1, library=library)
    memory = int(one.memory)
    one.close()
    network = module.Network(library=library)
    try:
        yield _Built(module, library, network, memory)
    finally:
        network.close()


def _compared_int8(built: _Built, model: nn.Module, images: Images) -> tuple[Comparison, tuple[int, int]]:
    """The network with int8 numbers beside the plain one; layers that have them, alone and in batches."""
    with contextlib.closing(built.module.Network(isa=INT8, library=built.library)) as network:
        compared = compare(
            lambda x: model(x).flatten(1), lambda x: torch.from_numpy(network(x.numpy())), images
        )
        return compared, (network.int8_layers(1), network.int8_layers(network.max_batch))


def _of_shape(images: Iterable[Tensor], shape: tuple[int, ...]) -> Iterator[Tensor]:
    for x in images:
        if tuple(x.shape[1:]) != tuple(shape):
            raise UserError(
                f"calibration images are of shape {list(x.shape)}, the network's are "
                f"[N, {', '.join(map(str, shape))}]"
            )
        yield x


def load_module(path: Path) -> ModuleType:
    """Import a Python file that an export wrote."""
    spec = importlib.util.spec_from_file_location(f"clicktrain_exported_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
