"""Generated kernels built for other processors than this one, as far as it can run them: `make slow`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clicktrain.kernels.native import toolchain

KERNEL_TESTS = [
    "tests/bench/test_bench_timing.py",
    "tests/kernels/test_activations.py",
    "tests/kernels/test_batch_norm2d.py",
    "tests/kernels/test_blocked_layout.py",
    "tests/kernels/test_blocked_operator.py",
    "tests/kernels/test_conv_statistics.py",
    "tests/kernels/test_max_pool2d.py",
    "tests/kernels/test_pooled_norm.py",
    "tests/kernels/test_sparse_conv2d_blocked.py",
]
# What -march says, float32 lanes and pairs: as such a processor has them, and wider than its instructions.
VARIANTS = [
    ("x86-64", "", ""),
    ("x86-64-v2", "16", "1"),
    ("x86-64-v3", "", ""),
    ("x86-64-v3", "16", "1"),
    ("x86-64-v4", "", ""),
    ("x86-64-v4", "8", "1"),
    ("armv8-a", "", ""),
    ("native", "", ""),
]


def instructions(compiler: str, march: str) -> set[str] | None:
    """The macros of what code for such a processor may use; None if the compiler does not know it."""
    command = [compiler, f"-march={march}", "-dM", "-E", "-x", "c", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(re.findall(r"^#define (__[A-Z0-9_]+__) ", done.stdout, re.M)) if not done.returncode else None


def skip_what_cannot_run(compiler: str, march: str) -> None:
    here, there = instructions(compiler, "native"), instructions(compiler, march)
    if there is None:
        pytest.skip(f"{compiler} does not know -march={march}")
    missing = there - (here or set())
    if missing:
        pytest.skip(f"this processor does not run -march={march}: no {', '.join(sorted(missing))}")


@pytest.mark.slow
@pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
@pytest.mark.parametrize(("march", "lanes", "pairs"), VARIANTS)
def test_kernels_for_other_processors(
    march: str, lanes: str, pairs: str, repository: Path, tmp_path: Path
) -> None:
    tools = toolchain()
    assert tools is not None
    skip_what_cannot_run(tools.compiler, march)
    environment = {
        **os.environ,
        "CLICKTRAIN_CFLAGS": f"-march={march}",
        "CLICKTRAIN_LANES": lanes,
        "CLICKTRAIN_PAIRS": pairs,
        "CLICKTRAIN_KERNEL_CACHE": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *KERNEL_TESTS]
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False, timeout=3000
    )
    print(done.stdout[-300:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
