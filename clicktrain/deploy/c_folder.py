"""Export as C: a folder with the weights and all that runs them, built and compared before it is kept."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.deploy.checked_export import FinishedRun, drafts_beside
from clicktrain.deploy.comparison import RELATIVE, Comparison, Images, batches, compare
from clicktrain.errors import UserError
from clicktrain.inference.capture import capture
from clicktrain.inference.program import Program
from clicktrain.inference.runtime_files import filled, renamed, runtime_file, runtime_texts
from clicktrain.inference.tables import constants, model_source
from clicktrain.inference.weight_file import WeightFile

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
    """

    path: Path
    weight_bytes: int
    dense_bytes: int
    isa: str
    memory_bytes: int

    def sentences(self, images: str = "images") -> list[str]:
        """What was written and how it was checked."""
        return [
            f"{self.path}: weights {self.weight_bytes / 2**20:.2f} MB "
            f"(dense {self.dense_bytes / 2**20:.2f} MB), "
            f"memory for one image at a time {self.memory_bytes / 2**20:.2f} MB",
            f"built and run ({self.isa}) on {self.images} {images}: {self.sentence()}",
        ]

    def __str__(self) -> str:
        return "\n".join(self.sentences())


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
        found = batches(images, run.image_shape)
        few = list(itertools.islice(found, 2))  # the first image, and others
        stored = torch.cat([x for x, _ in few])
        weight_bytes = write_c(model, program, draft, run.facts, stored, name)
        with _built(draft, name, place) as (network, memory):
            compared = compare(
                lambda x: model(x).flatten(1),
                lambda x: torch.from_numpy(network(x.numpy())),
                itertools.chain(few, found),
            )
            isa = str(network.isa)
        compared.check("the C code")
        if output.exists():
            shutil.rmtree(output)
        draft.rename(output)
    dense = sum(tensor.numel() * 4 for tensor in model.state_dict().values() if tensor.is_floating_point())
    return ExportedC(
        path=output,
        weight_bytes=weight_bytes,
        dense_bytes=dense,
        isa=isa,
        memory_bytes=memory,
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
) -> int:
    """Write all files of a program into an empty folder, without building or comparing; bytes of the weights.

    ``images``, at least one, are kept for the self-test, with what ``model``, which the program is of, makes
    of them in float64.
    """
    weights = WeightFile()
    source, fingerprint = model_source(program, weights, facts)
    (folder / "weights.bin").write_bytes(weights.finish(fingerprint))
    texts = {**runtime_texts(), "model.c": source, "check.c": runtime_file("check.c")}
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


def _check_file(model: nn.Module, images: Tensor) -> bytes:
    """Images and results for ``check.c``."""
    results: Tensor = copy.deepcopy(model).double()(images.double()).flatten(1)
    scale = max(float(results.abs().max()), 1.0) if bool(results.isfinite().all()) else 1.0
    head = struct.pack("<8siid", b"CTCHECK1", len(images), 0, RELATIVE * scale)
    parts = images.float().numpy().astype("<f4"), results.numpy().astype("<f8")
    return b"".join([head, *(bytes(part.tobytes()) for part in parts)])


@contextlib.contextmanager
def _built(folder: Path, name: str, scratch: Path) -> Iterator[tuple[Any, int]]:
    """The folder's network, built elsewhere, and the bytes that it needs for one image at a time."""
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
        yield network, memory
    finally:
        network.close()


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
