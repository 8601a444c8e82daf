"""Builds of exported networks for tests: what does not depend on a network is compiled once a process."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clicktrain.deploy.c_folder import write_c
from clicktrain.inference.capture import capture
from clicktrain.inference.program import Program
from clicktrain.inference.runtime_files import runtime_file, runtime_texts

COMPILER = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
FLAGS = ("-std=c11", "-O1", "-ffp-contract=fast", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror")
KERNELS = ("kernels_base.c", "kernels_avx2.c", "kernels_avx512.c", "kernels_pairs.c")
OWN = (
    "model.c", "runtime.c", "threads.c", "plan.c", "plan_taps.c", "plan_sets.c", "plan_pointwise.c",
    "measure.c", "kernels_columns.c", "kernels_column_pairs.c", "kernels_windows.c", "kernels_window_pairs.c",
    "kernels_fours.c", "kernels_column_fours.c", "kernels_window_fours.c",
)  # fmt: skip
"""Of which some depend on the network."""


@dataclass(frozen=True)
class Finished:
    """As `clicktrain.train.LoadedRun`, of a network that was never trained."""

    model: nn.Module
    image_shape: tuple[int, int, int] = (3, 12, 12)
    facts: dict[str, Any] = field(default_factory=lambda: {"model": "mine", "classes": []})


def compile_all(jobs: list[list[str]]) -> None:
    """Side by side; fails with what the compiler says."""
    assert COMPILER is not None
    running = [subprocess.Popen([COMPILER, *job], stderr=subprocess.PIPE, text=True) for job in jobs]
    for process in running:
        _, error = process.communicate()
        assert process.returncode == 0, error[-3000:]


@functools.cache
def kernel_objects(flags: tuple[str, ...] = FLAGS) -> tuple[str, ...]:
    """Objects of the kernels, which know no network; kept from run to run, by what they are made of."""
    texts = runtime_texts()
    what = repr((sorted(texts.items()), flags, os.getuid()))
    kept = Path(tempfile.gettempdir()) / f"clicktrain-c-{hashlib.sha256(what.encode()).hexdigest()[:16]}"
    objects = [str(kept / f"{name}.o") for name in KERNELS]
    if kept.exists() and kept.stat().st_uid == os.getuid():
        return tuple(objects)
    folder = Path(tempfile.mkdtemp(prefix="clicktrain-c-"))
    for name, text in texts.items():
        (folder / name).write_text(text)
    constants = (
        "#define MODEL_CHANNELS 1\n#define MODEL_HEIGHT 1\n#define MODEL_WIDTH 1\n#define MODEL_RESULTS 1"
    )
    (folder / "model.h").write_text(runtime_file("model.h.in").replace("@CONSTANTS@", constants))
    compile_all([[*flags, "-c", str(folder / n), "-o", str(folder / f"{n}.o")] for n in KERNELS])
    with contextlib.suppress(OSError):  # another process was faster
        folder.rename(kept)
    return tuple(objects)


def write(
    model: nn.Module,
    shape: tuple[int, int, int],
    folder: Path,
    facts: Mapping[str, Any] = MappingProxyType({}),
    ranges: Mapping[str, float] = MappingProxyType({}),
) -> Program:
    """The folder of a network, not built; its program. ``ranges``: by names of values."""
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = capture(model.eval(), shape)
        by_value = {value: ranges[value.name] for value in program.values if value.name in ranges}
        write_c(model, program, folder, facts, images, ranges=by_value)
    return program


def build(folder: Path, flags: tuple[str, ...] = FLAGS, *more: str) -> Path:
    """The shared library of a folder."""
    library = folder / "libmodel.so"
    compile_all(
        [
            [
                *flags,
                "-shared",
                *(str(folder / n) for n in OWN),
                *kernel_objects(flags),
                *more,
                "-o",
                str(library),
            ]
        ]
    )
    return library


def knows(flag: str) -> bool:
    """Whether the compiler takes a flag."""
    trial = [str(COMPILER), flag, "-E", "-x", "c", os.devnull]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


SANITIZED = (*FLAGS, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g0")


def self_test(
    folder: Path, into: Path, flags: tuple[str, ...] = FLAGS, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Compile the folder's self-test with these flags, and run it."""
    program = into / "self_test"
    sources = [str(folder / name) for name in (*OWN, "check.c")]
    compile_all([[*flags, *sources, *kernel_objects(flags), "-o", str(program)]])
    files = [str(folder / name) for name in ("weights.bin", "check.bin")]
    return subprocess.run(
        [str(program), *files], capture_output=True, text=True, check=False, env=environment(**variables)
    )


CROSS = ("aarch64-linux-gnu-gcc", "qemu-aarch64")


def on_arm(folder: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """Compile the folder's self-test for 64-bit ARM, and run it in the emulator; skips without them."""
    missing = [tool for tool in CROSS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    flags = ["-std=c11", "-O1", "-ffp-contract=fast", "-static", "-Wall", "-Wextra", "-Werror"]
    sources = [str(folder / name) for name in (*OWN, *KERNELS, "check.c")]
    program = into / "self_test_arm"
    subprocess.run([CROSS[0], *flags, *sources, "-o", str(program), "-lm"], check=True)
    files = [str(folder / name) for name in ("weights.bin", "check.bin")]
    return subprocess.run([CROSS[1], str(program), *files], capture_output=True, text=True, check=False)


class Library:
    """The C functions, without the Python file that is exported."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.model_isa_name.restype = ctypes.c_char_p

    def names(self) -> list[str]:
        found = []
        while (name := self.c.model_isa_name(len(found))) is not None:
            found.append(name.decode())
        return found

    def open(self, weights: bytes, batch: int, isa: str | None = None) -> tuple[int, ctypes.c_void_p, Any]:
        network = ctypes.c_void_p()
        held = np.frombuffer(weights + b"\0" * 8, np.uint8).copy()
        code = self.c.model_open(
            ctypes.c_void_p(held.ctypes.data), ctypes.c_size_t(len(weights)), batch,
            None if isa is None else isa.encode(), ctypes.byref(network),
        )  # fmt: skip
        return code, network, held

    def run(
        self, weights: bytes, images: Tensor, results: int, isa: str | None = None, threads: int = 1
    ) -> Tensor:
        code, network, held = self.open(weights, len(images), isa)
        assert code == 0, code
        found = self.call(network, images, results, threads)
        del held
        return found

    def run_planned(
        self, folder: Path, plan: Path, images: Tensor, results: int, isa: str | None = None, threads: int = 1
    ) -> Tensor:
        network = ctypes.c_void_p()
        code = self.c.model_open_planned(
            bytes(folder / "weights.bin"), bytes(plan), len(images), None if isa is None else isa.encode(),
            ctypes.byref(network),
        )  # fmt: skip
        assert code == 0, code
        return self.call(network, images, results, threads)

    def call(self, network: ctypes.c_void_p, images: Tensor, results: int, threads: int = 1) -> Tensor:
        """Run an open network, and close it."""
        context = ctypes.c_void_p()
        assert self.c.model_context_new_threads(network, threads, ctypes.byref(context)) == 0
        x = np.ascontiguousarray(images.numpy(), np.float32)
        y = np.full((len(x), results), np.nan, np.float32)
        code = self.c.model_run(
            context, ctypes.c_void_p(x.ctypes.data), ctypes.c_size_t(x.size), len(x),
            ctypes.c_void_p(y.ctypes.data), ctypes.c_size_t(y.size),
        )  # fmt: skip
        assert code == 0, code
        self.c.model_context_free(context)
        self.c.model_close(network)
        return torch.from_numpy(y)


def alive(model: nn.Module, density: float = 1.0, seed: int = 0) -> nn.Module:
    """Random statistics, as of a trained network, and weights of which a share is kept."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 2)
                if module.affine:
                    uniform(module.weight, 0.5, 1.5)
                    uniform(module.bias, -0.3, 0.3)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and density < 1:
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) < density)
    return model.eval()


def check(
    model: nn.Module, shape: tuple[int, int, int], folder: Path, batches: tuple[int, ...] = (1, 3, 19),
    isas: tuple[str, ...] | None = None, flags: tuple[str, ...] = FLAGS,
) -> None:  # fmt: skip
    """Every set of instructions and both layouts against float64."""
    write(model, shape, folder)
    library = Library(build(folder, flags))
    weights = (folder / "weights.bin").read_bytes()
    images = torch.randn(max(batches), *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.double()(images.double()).flatten(1)
        model.float()
    scale = float(expected.abs().max()) + 1e-6
    for isa in isas or library.names():
        for batch in batches:
            got = library.run(weights, images[:batch], expected.shape[1], isa)
            worst = float((got.double() - expected[:batch]).abs().max()) / scale
            assert worst < (2e-2 if isa.endswith("bf16") else 5e-6), (isa, batch, worst)
            threads = 2 + batch % 2
            assert torch.equal(got, library.run(weights, images[:batch], expected.shape[1], isa, threads))


CHOICES = {
    "rows, L1": 9,
    "rows, L2": 17,
    "flat, L1": 10,
    "flat, L2": 18,
    "taps": 3,
    "columns": 20,
    "windows": 21,
    "pointwise, L1": 14,
    "pointwise, L2": 22,
}
"""Candidates of measured plans, as they are written in a plan's file: see ``plan.h``."""


def plan_file(folder: Path, program: Program, isa: str, choice: int) -> Path:
    """A plan by which every convolution runs the same way, where it can."""
    weights = (folder / "weights.bin").read_bytes()
    fingerprint = struct.unpack("<Q", weights[16:24])[0]
    head = struct.pack("<8s16sQII", b"CTPLAN01", isa.encode(), fingerprint, len(program.ops), 0)
    path = folder / f"{isa}-{choice}.plan"
    path.write_bytes(head + bytes([choice]) * (2 * len(program.ops)))
    return path


def check_choices(
    model: nn.Module, shape: tuple[int, int, int], folder: Path, batches: tuple[int, ...] = (1, 2, 17),
    choices: Iterable[str] = tuple(CHOICES),
) -> None:  # fmt: skip
    """Every candidate with every set of instructions against float64."""
    write(model, shape, folder)
    library = Library(build(folder))
    program = capture(model, shape)
    images = torch.randn(max(batches), *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(images.double()).flatten(1)
    scale = float(expected.abs().max()) + 1e-6
    for isa in library.names():
        for name in choices:
            plan = plan_file(folder, program, isa, CHOICES[name])
            for batch in batches:
                got = library.run_planned(folder, plan, images[:batch], expected.shape[1], isa)
                worst = float((got.double() - expected[:batch]).abs().max()) / scale
                assert worst < (2e-2 if isa.endswith("bf16") else 5e-6), (isa, name, batch, worst)
                again = library.run_planned(folder, plan, images[:batch], expected.shape[1], isa, 3)
                assert torch.equal(got, again), (isa, name, batch)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, **changes}
