"""The compiler, the cache of libraries, and generated kernels under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from clicktrain.kernels.native import build, load, static_source, toolchain
from clicktrain.kernels.native.library import call

needs_compiler = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_over_lanes(dtype: torch.dtype) -> None:
    tools = toolchain()
    assert tools is not None
    lanes = tools.lanes(dtype)
    source = static_source("kernels/native/vector.h", "A test.", dtype, lanes) + (
        "void run(const vec *x, real *out) {"
        " add_lane_sums4(out, x[0], x[1], x[2], x[3]); out[4] = lane_sum(x[0]); vec s = splat(out[4]);"
        " out[5] = s[LANES - 1]; }"
    )
    x = torch.randn(4, lanes, dtype=dtype)
    out = torch.ones(6, dtype=dtype)
    call(load(source).run, x, out)
    assert torch.allclose(out[:4], 1 + x.sum(1))
    assert torch.allclose(out[4:], x[0].sum().expand(2))


@needs_compiler
def test_library_is_built_once_and_refused_text_says_why(tmp_path: Path) -> None:
    first = build("int run(void) { return 7; }\n")
    stamp = first.stat().st_mtime_ns
    assert build("int run(void) { return 7; }\n") == first
    assert first.stat().st_mtime_ns == stamp
    with pytest.raises(RuntimeError, match="refused a generated kernel"):
        build("int run(void) { return nonsense; }\n")


@needs_compiler
def test_many_processes_may_build_the_same_library_at_once(tmp_path: Path) -> None:
    code = """
    from clicktrain.kernels.native import load
    print(load("int run(void) { return 11; }\\n").run())
    """
    environment = {**os.environ, "CLICKTRAIN_KERNEL_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["11"] * 3
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_cache_that_others_may_write_to_is_not_trusted(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    code = "from clicktrain.kernels.native.library import cache_folder; print(cache_folder())"
    found = run_python(code, CLICKTRAIN_KERNEL_CACHE=str(tmp_path))
    assert found.returncode == 0
    assert found.stdout.strip() != str(tmp_path)


def test_without_a_compiler_there_is_none(tmp_path: Path) -> None:
    code = """
    from clicktrain.kernels.native import build, toolchain
    assert toolchain() is None
    try:
        build("int run(void);")
    except RuntimeError as error:
        print(error)
    """
    found = run_python(code, PATH=str(tmp_path), CC="")
    assert found.returncode == 0, found.stderr
    assert "install gcc or clang" in found.stdout


SANITIZED = """
from dataclasses import replace
import torch
from clicktrain.formats.packed import Structure
from clicktrain.kernels.batch_norm2d import launch as norm
from clicktrain.kernels.max_pool2d import Pooling, ops as pool
from clicktrain.kernels.sparse_conv2d.blocked import launch
from clicktrain.kernels.sparse_conv2d.blocked.prepared import prepare, variants
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Tiling
from clicktrain.kernels.native import toolchain

torch.manual_seed(0)
lanes = toolchain().lanes(torch.float32)
# Not what an earlier kernel needed: of exactly this size.
launch._SCRATCH.take = lambda count, dtype: torch.empty(count, dtype=dtype)
cases = [
    # filters, channels, kernel, image, stride, padding, dilation, blocks, threads
    (6, 5, (3, 3), (4, 4), (1, 1), (1, 1), (1, 1), 2, 1),
    (6, 5, (3, 3), (13, 10), (2, 2), (1, 1), (1, 1), 1, 3),
    (3, 4, (2, 2), (9, 19), (1, 2), (2, 1), (1, 2), 2, 2),
    (5, 6, (3, 3), (9, 7), (1, 1), (1, 1), (1, 1), 1, 2),  # tiles at the edges and between them
    (4, 2, (1, 3), (1, 33), (1, 1), (0, 2), (1, 1), 1, 1),
    (3, 2, (1, 1), (5, 4), (1, 3), (0, 2), (1, 1), 1, 1),  # padding wider than a window
]
for f, c, kernel, image, stride, padding, dilation, blocks, threads in cases:
    torch.set_num_threads(threads)
    kept = torch.rand(2, kernel[0] * kernel[1]) < 0.5  # two patterns: little code
    mask = kept[torch.randint(2, (f, c))].view(f, c, *kernel) & (torch.rand(f, c, 1, 1) < 0.7)
    structure = Structure.from_mask(mask)
    problem = ConvProblem.make(c, f, kernel, image, stride, padding, dilation)
    values = torch.randn(structure.values_shape)
    x = torch.randn(blocks, c, *image, lanes)
    for code in ("unrolled", "indexed"):
        one = {v.phase: v for v in variants(structure, problem) if v.tiling.code == code}
        forward = one["forward"]
        n = blocks * lanes - 3
        y, _, _ = launch.forward_statistics(x, values, torch.randn(f), forward.tables, forward.plan, n)
        if threads == 3:  # the same code without sums
            launch.forward(x, values, None, forward.tables, forward.plan)
        launch.dgrad(y, values, one["dgrad"].tables, one["dgrad"].plan)
        weight = one["wgrad"]
        launch.wgrad(x, y, structure.values_shape, weight.tables, weight.plan)
    sweep = Tiling((2 * stride[0], 2 * stride[1]), (2, 1), code="cache_blocked", sources=2, results=4)
    plan, tables = prepare(structure, problem, 1, {"forward": sweep, "dgrad": sweep})
    text, index = plan.to_json(), list(tables)
    y, _, _ = launch.forward_statistics(x, values, torch.randn(f), index, text, blocks * lanes - 3)
    launch.dgrad(y, values, index, text)
    if threads != 3:
        continue
    launch.forward(x, values, None, index, text)
    low = x.bfloat16()
    for code in ("unrolled", "indexed"):  # activations in bfloat16, multiplied in pairs where that can be
        tilings = {}
        for v in variants(structure, problem):
            if v.tiling.code == code:
                tilings[v.phase] = replace(v.tiling, pairs=code == "indexed" or v.phase == "wgrad")
        plan, tables = prepare(structure, problem, 1, tilings)
        text, index = plan.to_json(), list(tables)
        y, _, _ = launch.forward_statistics(low, values, None, index, text, blocks * lanes - 3)
        launch.dgrad(y, values, index, text)
        launch.wgrad(low, y, structure.values_shape, index, text)
empty = Structure.from_mask(torch.zeros(3, 2, 3, 3, dtype=torch.bool))
values = torch.zeros(empty.values_shape)
for code in ("unrolled", "cache_blocked", "indexed"):  # a layer that has no weight left
    tilings = {phase: Tiling((2, 2), code=code) for phase in ("forward", "dgrad")}
    tilings["wgrad"] = Tiling((1, 2), code="indexed" if code == "indexed" else "unrolled")
    plan, tables = prepare(empty, ConvProblem.make(2, 3, (3, 3), (6, 5)), 1, tilings)
    text, index = plan.to_json(), list(tables)
    x = torch.randn(1, 2, 6, 5, lanes)
    y = launch.forward(x, values, None, index, text)
    launch.dgrad(y, values, index, text)
    launch.wgrad(x, y, empty.values_shape, index, text)
windows = Pooling(2, ceil_mode=True), Pooling(3, 2, 1), Pooling((3, 2), (1, 3), (1, 0), 2)
for number, pooling in enumerate(windows):
    torch.set_num_threads(number + 1)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 9, 7, lanes).to(dtype)
        y, taps = pool.forward(x, pooling.window(), pooling.ceil_mode)
        pool.backward(y, taps, (9, 7), pooling.window())
        n, window = 2 * lanes - 3, pooling.window()
        for activation in ("relu", "gelu"):
            out = norm.pooled_forward(x, None, None, None, window, pooling.ceil_mode, n, 0.1, activation)
            rest = None, None, None, None, out.mean, out.var, (9, 7), window, n, 0.1, activation
            norm.pooled_backward(out.y, out.maxima, out.taps, *rest, False)
            z, mean, var = norm.forward(x, None, None, x, n, 0.1, activation)
            kept = (z, None) if activation == "relu" else (None, x)
            norm.backward(z, x, *kept, None, None, mean, var, n, 0.1, activation, True)
            z = norm.affine(x, None, mean, None, n, activation)
            norm.affine_backward(z, x, None, None, None, mean, n, activation, False, False)
print("clean")
"""


@pytest.mark.long
@needs_compiler
def test_generated_kernels_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    tools = toolchain()
    assert tools is not None
    found = subprocess.run(
        [tools.compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    library = found.stdout.strip()
    if "gcc" not in Path(os.path.realpath(tools.compiler)).name or not Path(library).is_absolute():
        pytest.skip("the address sanitizer's library is loaded ahead, which is known how to do for gcc only")
    assert shutil.which("env")
    result = run_python(
        SANITIZED,
        LD_PRELOAD=os.path.realpath(library),
        CC=f"env -u LD_PRELOAD {tools.compiler}",  # compilers would run slowly under it
        ASAN_OPTIONS="detect_leaks=0",
        CLICKTRAIN_CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -O0",
        CLICKTRAIN_KERNEL_CACHE=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "clean" in result.stdout
