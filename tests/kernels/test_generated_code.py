"""What the generators refuse, and what compilers make of their text: the instructions that it counts on."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from clicktrain.kernels.native import toolchain
from clicktrain.kernels.sparse_conv2d.blocked.codegen import source
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Phase, Tiling

PATTERNS = ((0, 1, 3, 4), (1, 2, 4, 5), (3, 4, 6, 7), (1, 3, 4, 5), (1, 4, 5, 7))
pytestmark = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")


def test_only_bfloat16_is_multiplied_in_pairs() -> None:
    problem = ConvProblem.make(3, 4, (3, 3), (5, 5))
    pairs = Tiling((2, 4), code="indexed", pairs=True)
    with pytest.raises(ValueError, match="only bfloat16 is multiplied in pairs"):
        source("forward", problem, (), pairs, torch.float32, 8)
    with pytest.raises(ValueError, match="cache_blocked code does not multiply pairs in forward"):
        source("forward", problem, (), Tiling((2, 4), code="cache_blocked", pairs=True), torch.bfloat16, 8)


def test_wgrad_is_not_cache_blocked() -> None:
    problem = ConvProblem.make(3, 4, (3, 3), (5, 5))
    with pytest.raises(ValueError, match="has code 'unrolled' or 'indexed', not 'cache_blocked'"):
        source("wgrad", problem, (), Tiling((2, 4), code="cache_blocked"), torch.float32, 8)


@pytest.mark.parametrize("phase", PHASES)
def test_the_instruction_for_pairs_is_used_where_it_is_known(phase: Phase, tmp_path: Path) -> None:
    tools = toolchain()
    assert tools is not None
    path = tmp_path / "kernel.c"
    tiling = Tiling((4, 4), code="indexed", pairs=True)
    path.write_text(
        source(phase, ConvProblem.make(8, 8, (3, 3), (8, 8), (1, 1), (1, 1)), (), tiling, torch.bfloat16, 16)
    )
    command = [tools.compiler, "-O2", "-march=cooperlake", "-ffp-contract=fast", "-S", str(path), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "march" in done.stderr:
        pytest.skip(f"{tools.version} knows no processor with AVX512_BF16")
    assert done.returncode == 0, done.stderr
    loop = [line.split() for line in done.stdout.splitlines() if "vdpbf16ps" in line]
    register = "%zmm" if phase != "wgrad" else "%ymm"
    assert len(loop) >= 12
    assert all(register in line[-1] for line in loop)
    assert phase == "wgrad" or "vfmadd" not in done.stdout


@pytest.mark.parametrize(("march", "lanes"), [("haswell", 8), ("skylake-avx512", 16)])
def test_a_sweep_loads_each_window_once_and_spills_nothing(march: str, lanes: int, tmp_path: Path) -> None:
    tools = toolchain()
    assert tools is not None
    path = tmp_path / "kernel.c"
    problem = ConvProblem.make(16, 16, (3, 3), (32, 32), (1, 1), (1, 1))
    tiling = Tiling((4, 4), (1, 4), code="cache_blocked")
    path.write_text(source("forward", problem, PATTERNS, tiling, torch.float32, lanes))
    command = [tools.compiler, "-O2", f"-march={march}", "-ffp-contract=fast", "-S", str(path), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "march" in done.stderr or "gcc" not in Path(os.path.realpath(tools.compiler)).name:
        pytest.skip(f"{tools.version} makes no code of gcc's for {march}")
    assert done.returncode == 0, done.stderr
    functions = re.findall(r"kernels_\d+[\w.]*:\n(.*?)\.size", done.stdout, re.DOTALL)
    operations = []
    for text in functions:
        vector = [line.strip() for line in text.splitlines() if line.strip().startswith("v")]
        operations.append(sum("vfmadd" in line for line in vector))
        assert sum("(" in line and not line.endswith(")") for line in vector) <= 50  # 4 + 16 and windows
        assert sum(line.endswith(")") for line in vector) <= 16
        assert not any("%rsp" in line for line in vector)
    # Inside the image all sums take all taps; its edges have code of their own where taps reach over them.
    assert operations.count(64) == len(PATTERNS) < len(functions) < 9 * len(PATTERNS)
    assert min(operations) >= 32


@pytest.mark.parametrize("phase", ["forward", "dgrad"])
def test_pairs_of_patterns_are_two_instructions_for_four_taps(phase: Phase, tmp_path: Path) -> None:
    tools = toolchain()
    assert tools is not None
    path = tmp_path / "kernel.c"
    problem = ConvProblem.make(16, 16, (3, 3), (32, 32), (1, 1), (1, 1))
    tiling = Tiling((4, 4), (2, 4), pairs=True)
    path.write_text(source(phase, problem, PATTERNS, tiling, torch.bfloat16, 16))
    command = [tools.compiler, "-O2", "-march=cooperlake", "-ffp-contract=fast", "-S", str(path), "-o", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "march" in done.stderr or "gcc" not in Path(os.path.realpath(tools.compiler)).name:
        pytest.skip(f"{tools.version} makes no code of gcc's for processors with AVX512_BF16")
    assert done.returncode == 0, done.stderr
    (tile,) = re.findall(r"tile_0_0:\n(.*?)\.size", done.stdout, re.DOTALL)
    lines = [line.strip() for line in tile.splitlines()]
    products = sum(line.startswith("vdpbf16ps") for line in lines)
    assert 31 * len(PATTERNS) <= products <= 32 * len(PATTERNS)  # ends that are alike may be shared
    # Squares take none, T shapes one for each position.
    assert sum(line.startswith("vpblendmw") for line in lines) <= 2 * 16
    # The next kernel's code is known before this one begins: it jumps by itself, without a table.
    assert sum(line.startswith("jmp\t*%r") for line in lines) > len(PATTERNS) // 2
    assert not any("%rsp" in line and "zmm" in line for line in lines)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3", "x86-64-v4", "cooperlake", "armv8-a"])
def test_every_width_is_lowered_to_the_instructions_there_are(march: str, lanes: int, tmp_path: Path) -> None:
    # Compiled, not run: vectors wider or narrower than a register of that processor.
    tools = toolchain()
    assert tools is not None
    problem = ConvProblem.make(4, 4, (3, 3), (4, 4), (1, 1), (1, 1))
    paired = Tiling((2, 2), code="indexed", pairs=True)
    texts = [
        source("forward", problem, PATTERNS[:2], Tiling((2, 2)), torch.float32, lanes),
        source("forward", problem, (), paired, torch.bfloat16, lanes),
        source("wgrad", problem, (), paired, torch.bfloat16, lanes),
        source("dgrad", problem, PATTERNS[:2], Tiling((2, 2), pairs=True), torch.bfloat16, lanes),
    ]
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.c"
        path.write_text(text)
        command = [tools.compiler, "-O1", f"-march={march}", "-w", "-S", str(path), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "march" in done.stderr or "target CPU" in done.stderr:
            pytest.skip(f"{tools.version} knows no -march={march}")
        assert done.returncode == 0, done.stderr[:2000]
