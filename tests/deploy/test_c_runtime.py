"""The runtime of exported networks: what it refuses, the sanitizers, sets of instructions, threads."""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from c_builds import (
    FLAGS,
    OWN,
    SANITIZED,
    Library,
    alive,
    build,
    compile_all,
    environment,
    kernel_objects,
    knows,
    needs_compiler,
    self_test,
    write,
)
from torch import nn

from clicktrain.inference.runtime_files import runtime_texts
from clicktrain.inference.weight_file import HEADER, checksum

torch.set_num_threads(1)
pytestmark = [
    needs_compiler,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
SHAPE = (3, 9, 10)
OK, BAD_ARGUMENT, NOT_WEIGHTS, OTHER_VERSION, OTHER_NETWORK, DAMAGED, NO_SUCH_ISA = 0, 1, 4, 5, 6, 7, 8


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, stride=2), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.GELU(),
        nn.Conv2d(24, 40, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5),
    ]  # fmt: skip
    return alive(nn.Sequential(*layers), 0.3)


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="clicktrain-c-"))
    classes = ["a", 'b"', "c", "d", "e"]
    write(small(), SHAPE, path, {"classes": classes, "mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]})
    build(path)
    return path


@pytest.fixture
def library() -> Library:
    return Library(folder() / "libmodel.so")


def weights() -> bytes:
    return (folder() / "weights.bin").read_bytes()


def sealed(body: bytes, like: bytes) -> bytes:
    """A file whose checksum is right."""
    return like[:32] + struct.pack("<Q", checksum(body)) + like[40:HEADER] + body


def test_wrong_weights_are_refused(library: Library) -> None:
    good = weights()
    cases = {
        b"": NOT_WEIGHTS,
        good[:40]: NOT_WEIGHTS,
        good[:-1]: NOT_WEIGHTS,
        good + b"\0": NOT_WEIGHTS,
        b"X" + good[1:]: NOT_WEIGHTS,
        good[:8] + b"\2" + good[9:]: OTHER_VERSION,
        good[:12] + good[12:16][::-1] + good[16:]: NOT_WEIGHTS,
        good[:16] + bytes([good[16] ^ 1]) + good[17:]: OTHER_NETWORK,
        good[:100] + bytes([good[100] ^ 1]) + good[101:]: DAMAGED,
    }
    assert [library.open(bad, 1)[0] for bad in cases] == list(cases.values())
    assert library.open(good, 1)[0] == OK
    assert library.open(good, 0)[0] == BAD_ARGUMENT
    assert library.open(good, 1, "abacus")[0] == NO_SUCH_ISA


def test_damage_with_a_right_checksum_never_crashes(library: Library) -> None:
    draw = random.Random(0)
    good = weights()
    codes = set()
    images = torch.randn(3, *SHAPE)
    for _ in range(200):
        body = bytearray(good[HEADER:])
        for _ in range(draw.randint(1, 40)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        bad = sealed(bytes(body), good)
        code, network, _held = library.open(bad, 3)
        codes.add(code)
        if code == OK:
            library.c.model_close(network)
            library.run(bad, images, 5)
    assert codes == {OK, DAMAGED}  # other values, or other positions than there are values


def test_wrong_sizes_are_refused(library: Library) -> None:
    _, network, _held = library.open(weights(), 2)
    context = ctypes.c_void_p()
    assert library.c.model_context_new(network, ctypes.byref(context)) == OK
    floats = (ctypes.c_float * 1000)()
    image, results = 3 * 9 * 10, 5

    def run(images: object, image_floats: int, batch: int, out: object, result_floats: int) -> int:
        return library.c.model_run(
            context, images, ctypes.c_size_t(image_floats), batch, out, ctypes.c_size_t(result_floats)
        )

    assert run(floats, image, 1, floats, results) == OK
    for wrong in (
        (floats, image - 1, 1, floats, results), (floats, image, 1, floats, results + 1),
        (floats, image, 2, floats, 10), (floats, 0, 0, floats, 0), (floats, 3 * image, 3, floats, 15),
        (None, image, 1, floats, results), (floats, image, 1, None, results),
        (floats, image, -1, floats, results),
    ):  # fmt: skip
        assert run(*wrong) == BAD_ARGUMENT
    assert (
        library.c.model_run(None, floats, ctypes.c_size_t(image), 1, floats, ctypes.c_size_t(5))
        == BAD_ARGUMENT
    )
    library.c.model_context_free(context)
    library.c.model_close(network)
    library.c.model_context_free(None)
    library.c.model_close(None)


def test_threads_share_a_network(library: Library) -> None:
    images = torch.randn(8, *SHAPE)
    expected = library.run(weights(), images, 5)
    results: dict[int, torch.Tensor] = {}

    def work(place: int) -> None:
        for _ in range(20):
            results[place] = library.run(weights(), images[place : place + 1], 5)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(
        torch.cat([results[place] for place in range(8)]), expected, rtol=1e-5, atol=1e-5
    )


def test_the_self_test_compares_and_fails_when_something_is_wrong(tmp_path: Path) -> None:
    done = self_test(folder(), tmp_path)
    assert done.returncode == 0, done.stdout
    assert "all is right" in done.stdout
    assert done.stdout.count(": ok") == len(Library(folder() / "libmodel.so").names())
    stored = bytearray((folder() / "check.bin").read_bytes())
    stored[-1] ^= 0x80  # the sign of the last result
    (tmp_path / "check.bin").write_bytes(stored)
    program = [str(tmp_path / "self_test"), str(folder() / "weights.bin"), str(tmp_path / "check.bin")]
    assert subprocess.run(program, capture_output=True, check=False).returncode == 1
    assert subprocess.run([*program[:2], "missing"], capture_output=True, check=False).returncode == 1


@pytest.mark.slow
def test_nothing_is_read_or_written_elsewhere(tmp_path: Path) -> None:
    done = self_test(folder(), tmp_path, SANITIZED, ASAN_OPTIONS="detect_leaks=1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_damaged_weights_never_crash(seed: int, tmp_path: Path) -> None:
    """Thousands of files: of other sizes, with changed headers, with a right checksum."""
    program = tmp_path / "fuzz_loader"
    sources = [str(Path(__file__).with_name("fuzz_loader.c")), *(str(folder() / name) for name in OWN)]
    compile_all([[*SANITIZED, "-I", str(folder()), *sources, *kernel_objects(SANITIZED), "-o", str(program)]])
    done = subprocess.run(
        [str(program), str(folder() / "weights.bin"), "20000", str(seed), str(tmp_path)],
        capture_output=True, text=True, check=False, env=environment(ASAN_OPTIONS="detect_leaks=1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(count) for count in done.stdout.split()]
    for code in (OK, NOT_WEIGHTS, DAMAGED):
        assert counts[code] > 100, counts
    for code in (OTHER_VERSION, OTHER_NETWORK):
        assert counts[code] > 0, counts
    assert sum(counts) == 20000


@pytest.mark.slow
@pytest.mark.parametrize("level", ["native", "x86-64-v3", "x86-64"])
def test_built_for_one_level_of_instructions(level: str, tmp_path: Path) -> None:
    flags = (*FLAGS, f"-march={level}")
    if not knows(f"-march={level}"):
        pytest.skip(f"the compiler does not know -march={level}")
    done = self_test(folder(), tmp_path, flags)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_of_the_runtime_is_in_the_folder() -> None:
    have = {path.name for path in folder().iterdir()}
    assert have >= {*runtime_texts(), "model.c", "model.h", "weights.bin", "check.c", "check.bin", "Makefile"}
    assert "#include <omp.h>" not in (folder() / "runtime.c").read_text()
    source = (folder() / "model.c").read_text()
    assert '"b\\"", "c"' in source
