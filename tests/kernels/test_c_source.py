"""The C of the kernels can be read: static files in the package, generated parts with their indentation."""

from __future__ import annotations

import importlib.resources
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path

import pytest
import torch

from clicktrain.kernels.activations import NAMES
from clicktrain.kernels.batch_norm2d import launch as batch_norm
from clicktrain.kernels.blocked_layout import ops as blocked_layout
from clicktrain.kernels.max_pool2d import ops as max_pool
from clicktrain.kernels.native import STORED_TYPES, KernelError, build, compute_type, static_source, toolchain
from clicktrain.kernels.native.source import expand
from clicktrain.kernels.sparse_conv2d.blocked.codegen import source
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Tiling

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ((0, 1, 3, 4), (1, 2, 4, 5), (4,))
TILINGS = (
    Tiling((2, 4), (2, 2)),
    Tiling((2, 4), (1, 2), filters_per_tile=2),
    Tiling((2, 4), (1, 2), code="cache_blocked", sources=3, results=4),
    Tiling((2, 4), (2, 2), code="indexed", sources=3),
    Tiling((2, 2), (1, 1), code="indexed", images=2, pairs=True),
)
needs_compiler = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")


def lanes_of(dtype: torch.dtype, vector_bytes: int = 32) -> int:
    return vector_bytes // compute_type(dtype).itemsize


def static_files() -> dict[str, str]:
    """Path inside the package -> text, as an installed package gives them."""

    def walk(folder: Traversable, path: str) -> Iterator[tuple[str, str]]:
        for one in folder.iterdir():
            if one.is_dir():
                yield from walk(one, f"{path}{one.name}/")
            elif one.name.endswith((".c", ".h")):
                yield f"{path}{one.name}", one.read_text(encoding="utf-8")

    return dict(walk(importlib.resources.files("clicktrain"), ""))


def generated() -> Iterator[tuple[str, str]]:
    """Every kind of generated source: what it is, its text."""
    for stride in (1, 2):
        problem = ConvProblem.make(6, 8, (3, 3), (9, 12), (stride, stride), (1, 1))
        for phase in PHASES:
            for tiling in TILINGS:
                if tiling.code == "cache_blocked" and phase == "wgrad":
                    continue
                if phase == "dgrad" and tiling.filters_per_tile > 1:
                    continue
                for dtype in (torch.bfloat16,) if tiling.pairs else STORED_TYPES:
                    for sums in (False, True) if phase == "forward" else (False,):
                        text = source(phase, problem, PATTERNS, tiling, dtype, lanes_of(dtype), sums)
                        yield f"{phase} {tiling} {dtype} {sums} stride {stride}", text
    for dtype in STORED_TYPES:
        norms = [
            batch_norm.source(number, pooled) for number in range(len(NAMES)) for pooled in (False, True)
        ]
        for make in (*norms, max_pool.source, blocked_layout.source):
            yield f"{make} {dtype}", make(dtype, lanes_of(dtype))


def without_text(line: str) -> str:
    """A line of C without comments, strings and character constants."""
    return re.sub(r"//.*|\"(\\.|[^\"\\])*\"|'(\\.|[^'\\])*'", "", line).strip()


def indentation_faults(text: str) -> list[str]:
    """Lines whose indentation is not that of their braces; what follows a line without an end is deeper."""
    faults, depth, continued, macro = [], 0, False, False
    for number, line in enumerate(text.splitlines(), 1):
        bare = without_text(line)
        if macro or bare.startswith("#"):
            macro = line.endswith("\\")
            continue
        if not bare:
            continue
        indent = len(line) - len(line.lstrip(" "))
        closing = len(bare) - len(bare.lstrip("}"))
        expected = 2 * (depth - closing)
        if (indent <= expected) if continued and not bare.startswith("}") else (indent != expected):
            faults.append(f"{number}: {line}")
        depth += bare.count("{") - bare.count("}")
        # Statements, blocks, labels and the macros that stand for statements end a line.
        whole = re.search(r"[;{}]$|:$|^[A-Z_]+$|^_Pragma\(.*\)$|^[A-Z_0-9]+\(.*\)$", bare) is not None
        continued = not whole
    return faults if depth == 0 else [*faults, f"depth {depth} at the end"]


def test_faults_of_indentation_are_found() -> None:
    good = "int f(int a,\n      int b) {\n  if (a)\n    return b;\n  return 0;\n}\n"
    assert indentation_faults(good) == []
    for wrong in (
        good.replace("  return 0", "return 0"),
        good.replace("    return b", "  return b"),
        good.replace("  if", "   if"),
        good.replace("}\n", ""),
    ):
        assert indentation_faults(wrong)


def test_generated_kernels_are_indented_and_say_what_they_are() -> None:
    for name, text in generated():
        assert indentation_faults(text) == [], name
        assert text.startswith("// "), name
        for word in re.findall("forward|dgrad|wgrad|unrolled|cache_blocked|indexed|stride 2", name)[:2]:
            assert word.replace("stride 2", "stride 2x2") in text[:600], name
        assert max(map(len, text.splitlines())) <= 120, name
        assert '#include "' not in text, name


def test_static_files_are_indented() -> None:
    files = static_files()
    assert {"kernels/native/vector.h", "kernels/batch_norm2d/batch_norm2d.c", "bench/peak.c"} <= files.keys()
    for name, text in files.items():
        assert indentation_faults(text) == [], name
        assert text.startswith("// "), name
        assert max(map(len, text.splitlines())) <= 120, name


def test_a_wheel_has_every_static_file() -> None:
    declared = re.search(r"^clicktrain = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared
    folder = ROOT / "clicktrain"
    patterns = re.findall('"(.+?)"', declared[1])
    found = {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)}
    assert len(static_files()) > 10
    assert static_files().keys() <= found


def test_each_static_file_is_included_once_and_part_of_the_key() -> None:
    text = expand(
        '#include "kernels/native/vector.h"\n#include "kernels/native/vector.h"\n#include <omp.h>\n'
    )
    assert text.count("INLINE vec splat") == 1
    assert "#include <omp.h>" in text


@needs_compiler
@pytest.mark.parametrize("dtype", STORED_TYPES, ids=str)
@pytest.mark.parametrize("vector_bytes", [16, 32, 64])
def test_headers_compile_without_warnings(dtype: torch.dtype, vector_bytes: int, tmp_path: Path) -> None:
    lanes = lanes_of(dtype, vector_bytes)
    problem = ConvProblem.make(6, 8, (3, 3), (9, 12), (1, 1), (1, 1))
    texts = [static_source("kernels/native/vector.h", "A test.", dtype, lanes)]
    norms = batch_norm.source(), batch_norm.source(NAMES.index("gelu"), pooled=True)
    texts += [make(dtype, lanes) for make in (*norms, max_pool.source, blocked_layout.source)]
    for phase in PHASES:
        for tiling in (TILINGS[0], TILINGS[2], TILINGS[3], TILINGS[4]):
            fits = tiling.pairs <= (dtype is torch.bfloat16) and (phase, tiling.code) != (
                "wgrad",
                "cache_blocked",
            )
            if fits:
                texts.append(source(phase, problem, PATTERNS, tiling, dtype, lanes, phase == "forward"))
    for text in texts:
        check_syntax(text, tmp_path)


@needs_compiler
def test_headers_compile_alone(tmp_path: Path) -> None:
    path = "kernels/sparse_conv2d/blocked/shared/window_copy.h"
    text = f'#include "{path}"\nint nothing(void) {{ return 0; }}\n'
    check_syntax(text, tmp_path, f"-I{ROOT / 'clicktrain'}")
    check_syntax(text, tmp_path, f"-I{ROOT / 'clicktrain'}", "-DDTYPE=3", "-DPAIRS=2")


def check_syntax(text: str, folder: Path, *flags: str) -> None:
    tools = toolchain()
    assert tools is not None
    (folder / "kernel.c").write_text(text)
    kept = [flag for flag in tools.flags if flag not in ("-shared", "-fPIC")]
    command = [tools.compiler, *tools.arguments, *kept, *flags, "-fsyntax-only", "-Wall", "-Werror"]
    done = subprocess.run([*command, str(folder / "kernel.c")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@needs_compiler
def test_sources_are_kept_on_request(tmp_path: Path) -> None:
    code = "from clicktrain.kernels.native import build; build('int run(void) { return 13; }\\n')"
    environment = {**os.environ, "CLICKTRAIN_KERNEL_CACHE": str(tmp_path)}
    for value, suffixes in (("0", [".so"]), ("1", [".c", ".so"])):  # also of a library that is there already
        environment["CLICKTRAIN_KEEP_SOURCE"] = value
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
        assert sorted(path.suffix for path in tmp_path.iterdir()) == suffixes
    kept, library = sorted(tmp_path.iterdir(), key=lambda path: path.suffix)
    assert kept.stem == library.name.partition(".")[0]
    assert "return 13;" in kept.read_text()
    environment["CLICKTRAIN_KEEP_SOURCE"] = "yes"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "CLICKTRAIN_KEEP_SOURCE is 'yes': set it to 0 or 1, or leave it unset" in done.stderr


@needs_compiler
def test_a_refused_source_is_kept_and_the_error_says_where() -> None:
    text = "int run(void) { return nonsense_that_is_kept; }\n"
    with pytest.raises(KernelError, match=r"refused a generated kernel .*; its source is ") as caught:
        build(text)
    kept = Path(str(caught.value).rpartition("; its source is ")[2])
    try:
        assert text in kept.read_text()
    finally:
        kept.unlink()
