"""Which SIMD units kernels are generated for; every width, and pairs, run on whatever processor this is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from clicktrain.errors import UserError
from clicktrain.kernels.native import build, toolchain
from clicktrain.kernels.native.simd import Simd, native_simd, requested_simd

needs_compiler = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
ZEN4 = Simd(64, 32, True)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("isa", "simd"),
    [
        (("__SSE2__",), Simd(16, 16, False)),
        (("__ARM_NEON",), Simd(16, 32, False)),
        (("__SSE2__", "__AVX__"), Simd(32, 16, False)),
        (("__AVX__", "__AVX2__", "__FMA__"), Simd(32, 16, False)),
        (("__AVX__", "__AVX2__", "__AVX512F__"), Simd(64, 32, False)),
        (("__AVX__", "__AVX512F__", "__AVX512BF16__"), ZEN4),
        ((), Simd(16, 16, False)),
    ],
    ids=str,
)
def test_units_of_processors(isa: tuple[str, ...], simd: Simd) -> None:
    assert native_simd(isa) == simd


@pytest.mark.parametrize(
    ("lanes", "pairs", "simd"),
    [
        (None, None, ZEN4),
        ("", "", ZEN4),
        ("16", None, ZEN4),
        ("16", "0", Simd(64, 32, False)),
        (None, "0", Simd(64, 32, False)),
        ("8", None, Simd(32, 16, False)),
        ("8", "1", Simd(32, 16, True)),
        ("4", "1", Simd(16, 32, True)),
    ],
)
def test_units_that_the_environment_asks_for(
    lanes: str | None, pairs: str | None, simd: Simd, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CLICKTRAIN_LANES", lanes), ("CLICKTRAIN_PAIRS", pairs)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert requested_simd(ZEN4) == simd


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("CLICKTRAIN_LANES", value) for value in ("5", "32", "2", "-8", "8.0", " 8", "many")),
        *(("CLICKTRAIN_PAIRS", value) for value in ("2", "yes", "-1")),
    ],
)
def test_units_that_no_kernel_has_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} is '{value}': set it to"):
        requested_simd(ZEN4)


@needs_compiler
def test_the_command_line_refuses_them_in_a_sentence() -> None:
    command = [sys.executable, "-m", "clicktrain", "bench", "conv", "--shapes", "8,4,4"]
    environment = {**os.environ, "CLICKTRAIN_LANES": "5"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "CLICKTRAIN_LANES is '5'" in done.stderr
    assert "Traceback" not in done.stderr


_CONVOLUTION = """
import json
import torch
import torch.nn.functional as F
from clicktrain.formats.packed import Structure, unpack_values
from clicktrain.kernels.blocked_layout import block_batch, unblock_batch
from clicktrain.kernels.native import needed_toolchain
from clicktrain.kernels.sparse_conv2d.blocked import launch
from clicktrain.kernels.sparse_conv2d.blocked.prepared import variants
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem

torch.manual_seed(0)
tools = needed_toolchain()
assert tools.lanes(torch.float64) == tools.lanes(torch.float32) // 2
assert tools.lanes(torch.bfloat16) == tools.lanes(torch.float32)
kept = torch.zeros(2, 9, dtype=torch.bool)
kept[0, [0, 1, 3, 4]] = kept[1, [1, 4, 5, 7]] = True
structure = Structure.from_mask(kept[torch.randint(2, (5, 3))].view(5, 3, 3, 3))
problem = ConvProblem.make(3, 5, (3, 3), (4, 5), (1, 1), (1, 1))
n = 17
x = torch.randn(n, 3, 4, 5).bfloat16()
values = torch.randn(structure.values_shape).bfloat16().float()
dense = unpack_values(structure, values).double().requires_grad_()
theirs = x.double().requires_grad_()
y = F.conv2d(theirs, dense, padding=1)
gy = torch.randn(y.shape).bfloat16()
y.backward(gy.double())
blocks, g_blocks = (block_batch(t, tools.lanes(torch.bfloat16)) for t in (x, gy))
tried = []
for one in variants(structure, problem, dtype=torch.bfloat16):
    kind = [one.phase, one.tiling.code, one.tiling.pairs]
    if kind in tried:
        continue
    tried.append(kind)
    if one.phase == "forward":
        own, want = unblock_batch(launch.forward(blocks, values, None, one.tables, one.plan), n), y
    elif one.phase == "dgrad":
        own, want = unblock_batch(launch.dgrad(g_blocks, values, one.tables, one.plan), n), theirs.grad
    else:
        own = launch.wgrad(blocks, g_blocks, structure.values_shape, one.tables, one.plan)
        own, want = unpack_values(structure, own), dense.grad * (dense != 0)
    bound = 2**-8 * want.abs() + 1e-5 * want.abs().max()
    assert ((own.double() - want).abs() <= bound).all(), one
print(json.dumps([tools.lanes(torch.float32), tools.simd.pairs, tried]))
"""


@needs_compiler
@pytest.mark.parametrize(("lanes", "pairs"), [("4", "1"), ("8", "0"), ("16", "1")])
def test_a_convolution_at_every_width(lanes: str, pairs: str) -> None:
    done = python(_CONVOLUTION, CLICKTRAIN_LANES=lanes, CLICKTRAIN_PAIRS=pairs)
    assert done.returncode == 0, done.stderr
    found, multiplies, tried = json.loads(done.stdout)
    assert (found, multiplies) == (int(lanes), pairs == "1")
    assert {phase for phase, _, _ in tried} == {"forward", "dgrad", "wgrad"}
    assert any(paired for _, _, paired in tried) == (pairs == "1")


@needs_compiler
def test_units_are_part_of_the_keys_of_caches() -> None:
    tools = toolchain()
    assert tools is not None
    units = [ZEN4, Simd(64, 32, False), Simd(32, 32, False), Simd(32, 16, False)]
    assert len({build("int units = 1;", replace(tools, simd=one)) for one in units}) == len(units)
    code = "from clicktrain.compiler.plan_cache import place; print(place([], [], 1, []).name)"
    plans = [python(code, CLICKTRAIN_LANES="8", CLICKTRAIN_PAIRS=pairs) for pairs in "01"]
    assert all(done.returncode == 0 for done in plans)
    assert plans[0].stdout != plans[1].stdout


def test_lanes_here_are_those_asked_for() -> None:
    tools, asked = toolchain(), os.environ.get("CLICKTRAIN_LANES")
    if tools is None or not asked:
        pytest.skip("nothing asks for lanes")
    assert tools.lanes(torch.float32) == int(asked)
