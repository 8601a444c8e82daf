"""The exported folder as its users have it: make check, Python, C++, Rust, several networks in a program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from c_builds import FLAGS, KERNELS, OWN, Finished, alive, compile_all, environment, needs_compiler, write
from torch import nn

from clicktrain.deploy import export_c
from clicktrain.deploy.c_folder import load_module
from clicktrain.errors import UserError

torch.set_num_threads(1)
pytestmark = [
    needs_compiler,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
SHAPE = (2, 6, 7)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(160, 4)
    return alive(nn.Sequential(*layers), 0.3, seed)


FACTS = {
    "model": "package.module:factory",
    "classes": ["a", "b", "c", "d"],
    "mean": [0.4, 0.6],
    "std": [0.2, 0.3],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    path = tmp_path_factory.mktemp("export") / "c"
    write(network(), SHAPE, path, FACTS)
    return path, network()


@pytest.mark.long
def test_make_check_needs_nothing_but_a_compiler(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    for tool in ("cc", "as", "ld"):
        found = shutil.which(tool) or shutil.which("gcc")
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    copy = tmp_path / "folder"
    shutil.copytree(exported[0], copy)
    done = subprocess.run(
        [make, "check", "CFLAGS=-O1 -Wall -Wextra -Werror"], cwd=copy, env={"PATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (copy / "weights.bin").write_bytes(b"nothing")
    assert subprocess.run([make, "check"], cwd=copy, capture_output=True, check=False).returncode != 0


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is slow compiles fast."""
    monkeypatch.setenv("CC", "cc -O0")


@pytest.mark.long
@pytest.mark.usefixtures("quick_compiler")
def test_the_command_builds_it_runs_it_and_says_how_near_it_is(tmp_path: Path) -> None:
    finished = Finished(network(), SHAPE, FACTS)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(70, *SHAPE, generator=generator), torch.randint(4, (70,), generator=generator)
    done = export_c(finished, tmp_path / "c", [(x[:50], y[:50]), (x[50:], y[50:])], "tiny")
    with torch.no_grad():
        right = float((finished.model(x).argmax(1) == y).float().mean()) * 100
    assert done.accuracy == done.network_accuracy == pytest.approx(right)
    assert (done.images, done.weight_bytes) == (70, (done.path / "weights.bin").stat().st_size)
    assert 0 < done.max_difference <= done.tolerance
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    assert not list(done.path.glob("*.so"))
    assert (done.path / "tiny.h").exists()
    again = export_c(finished, tmp_path / "c", name="tiny")  # in place of the other; random images
    assert again.accuracy is None
    with pytest.raises(UserError, match="does not compute what the network does"):
        export_c(Finished(Noisy(), SHAPE, FACTS), tmp_path / "c")
    assert (done.path / "tiny.h").exists()


class Noisy(nn.Module):
    """Gives something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.linear = nn.Linear(84, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x.flatten(1)) + self.calls


def test_folders_with_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("x")
    finished = Finished(network(), SHAPE, FACTS)
    with pytest.raises(UserError, match="holds something else than an export"):
        export_c(finished, tmp_path / "own")
    with pytest.raises(UserError, match="there is no folder"):
        export_c(finished, tmp_path / "missing" / "c")
    with pytest.raises(UserError, match="is a file"):
        export_c(finished, tmp_path / "own" / "thesis.tex")
    with pytest.raises(UserError, match="name is 'My Net': use small letters"):
        export_c(finished, tmp_path / "c", name="My Net")
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


def test_without_a_compiler_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match="cannot be checked: there is no C compiler: install gcc or clang"):
        export_c(Finished(network(), SHAPE, FACTS), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.usefixtures("quick_compiler")
def test_python_without_torch(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = exported
    module = load_module(path / "model.py")
    assert (module.SHAPE, module.RESULTS, module.CLASSES) == (SHAPE, 4, ["a", "b", "c", "d"])
    library = module.build(tmp_path)
    network = module.Network(max_batch=4, library=library)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 7, 2), np.uint8)
    images = module.normalize(pixels)
    mean, std = (torch.tensor(v)[:, None, None] for v in (FACTS["mean"], FACTS["std"]))
    wanted = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(torch.from_numpy(images), wanted)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(network(images)), model(wanted), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"images of shape \[N, 2, 6, 7\] are needed"):
        network(images[:, :1])
    with pytest.raises(RuntimeError, match="these instructions are unknown"):
        module.Network(isa="abacus", library=library)
    with pytest.raises(RuntimeError, match="the file cannot be read"):
        module.Network(weights=tmp_path / "missing", library=library)
    assert network.memory < 50_000
    network.close()
    text = (
        "import sys; sys.modules['torch'] = None; import model; print(model.Network(library=sys.argv[1]).isa)"
    )
    done = subprocess.run(
        ["python3", "-c", text, str(library)], cwd=path, capture_output=True, text=True, check=False,
        env=environment(PYTHONPATH=str(Path(np.__file__).parent.parent)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_cmake_builds_a_library(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    shutil.copytree(exported[0], tmp_path / "model")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.10)\nproject(own C CXX)\nadd_subdirectory(model)\n"
        "add_executable(own model/example.cpp)\ntarget_link_libraries(own model)\n"
    )
    for more in (["-S", ".", "-B", "build"], ["--build", "build", "-j", "2"]):
        done = subprocess.run([cmake, *more], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    with torch.no_grad():
        expected = exported[1](torch.full((1, *SHAPE), 0.5))[0]
    assert results(tmp_path / "build" / "own", exported[0]) == pytest.approx(expected.tolist(), abs=1e-4)


def compiled(folder: Path, into: Path, name: str = "model") -> list[str]:
    sources = [n.replace("model.c", f"{name}.c") for n in (*OWN, *KERNELS)]
    objects = [str(into / f"{name}-{source}.o") for source in sources]
    compile_all([[*FLAGS, "-c", str(folder / s), "-o", o] for s, o in zip(sources, objects, strict=True)])
    return objects


@pytest.mark.long
def test_cpp_and_rust(exported: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = exported
    objects = compiled(path, tmp_path)
    with torch.no_grad():
        expected = model(torch.full((1, *SHAPE), 0.5))[0]
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "example"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(path / "example.cpp"), *objects, "-o", str(program)], check=True)
    assert results(program, path) == pytest.approx(expected.tolist(), abs=1e-4)
    if shutil.which("rustc") is None or shutil.which("ar") is None:
        pytest.skip("rustc is not installed: C++ only")
    subprocess.run(["ar", "rcs", str(tmp_path / "libmodel.a"), *objects], check=True)
    subprocess.run(
        ["rustc", str(path / "example.rs"), "-L", str(tmp_path), "-l", "static=model", "-o", str(program)],
        check=True,
    )
    assert results(program, path) == pytest.approx(expected.tolist(), abs=1e-4)


def results(program: Path, folder: Path) -> list[float]:
    done = subprocess.run([str(program)], cwd=folder, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


TWO = """
#include <stdio.h>
#include "one.h"
#include "other.h"
int main(void) {
  one_network *a; other_network *b;
  printf("%d ", one_open_file("weights-one.bin", 1, NULL, &a));
  printf("%d\\n", other_open_file("weights-other.bin", 1, NULL, &b));
  one_close(a); other_close(b);
  return 0;
}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiler")
def test_two_networks_in_one_program(tmp_path: Path) -> None:
    objects = []
    for number, name in enumerate(("one", "other")):
        folder = tmp_path / name
        export_c(Finished(network(number), SHAPE, FACTS), folder, name=name)
        objects += compiled(folder, tmp_path, name)
        shutil.copy(folder / "weights.bin", tmp_path / f"weights-{name}.bin")
        shutil.copy(folder / f"{name}.h", tmp_path)
    (tmp_path / "two.c").write_text(TWO)
    compile_all([[*FLAGS, str(tmp_path / "two.c"), *objects, "-o", str(tmp_path / "two")]])
    done = subprocess.run([str(tmp_path / "two")], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "0 0\n"
