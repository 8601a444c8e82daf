"""A damaged library is rebuilt, whatever the damage: no process dies of it, none computes with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from kernel_faults import DAMAGES, Case, Outcome, damage_cache, run_cases

from clicktrain.kernels.native import folder as cache_folders
from clicktrain.kernels.native import sealed, toolchain

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(toolchain() is None, reason="there is no C compiler"),
]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of an accelerated network."""
    base = tmp_path_factory.mktemp("intact")
    cache = base / "cache"
    outcome = run_cases(
        {"build": Case("accelerate", environment={"CLICKTRAIN_KERNEL_CACHE": str(cache)})}, base
    )
    assert outcome["build"].result == {"same": True, "accelerated": True, "blocked": ["0", "3"]}
    assert outcome["build"].warnings == []
    return cache


FEW = ("cut to a half", "zeroed", "another kernel under its name")
"""Kinds that a network is tried with each time; the others are slow tests."""
BETWEEN = [kind for kind in DAMAGES if kind != "another kernel under its name"]  # there is no other one


@pytest.fixture(scope="module")
def between(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """A single kernel, whose library is damaged after it was built and before it is loaded."""
    base = tmp_path_factory.mktemp("between")
    environment: dict[str, str | None] = {"CLICKTRAIN_KERNEL_CACHE": str(base / "cache")}
    return run_cases({k: Case("kernel", [i, k], environment) for i, k in enumerate(BETWEEN)}, base)


@pytest.mark.parametrize("kind", BETWEEN)
def test_damage_between_building_and_loading(between: dict[str, Outcome], kind: str) -> None:
    outcome = between[kind]
    assert (outcome.signal, outcome.error, outcome.warnings) == (0, "", [])
    assert outcome.result == BETWEEN.index(kind)


def accelerate_damaged(intact: Path, base: Path, wanted: Sequence[tuple[str, str]]) -> None:
    """`accelerate` after damage to its libraries: (kind, number of a library or all)."""
    cases = {}
    for number, (kind, which) in enumerate(wanted):
        cache = base / f"cache{number}"
        shutil.copytree(intact, cache)
        cases[f"cache{number}"] = Case(
            "accelerate", environment={"CLICKTRAIN_KERNEL_CACHE": str(cache)}, damage=(kind, which)
        )
    for name, outcome in run_cases(cases, base).items():
        assert (outcome.signal, outcome.error, outcome.warnings) == (0, "", []), cases[name].damage
        assert outcome.result == {"same": True, "accelerated": True, "blocked": ["0", "3"]}
        libraries = list((base / name).glob("*.so"))
        assert len(libraries) == len(list(intact.glob("*.so")))
        assert all(sealed.is_intact(library) for library in libraries)


def test_a_network_with_damaged_libraries(intact: Path, tmp_path: Path) -> None:
    one_each = [(kind, str(number)) for number, kind in enumerate(FEW)]
    accelerate_damaged(intact, tmp_path, [*one_each, ("cut to a half", "all")])


@pytest.mark.slow
def test_a_network_with_libraries_damaged_in_every_way(intact: Path, tmp_path: Path) -> None:
    one_each = [(kind, str(number)) for number, kind in enumerate(DAMAGES) if kind not in FEW]
    accelerate_damaged(intact, tmp_path, [*one_each, *((kind, "all") for kind in DAMAGES)])


def test_the_damages_are_damage(intact: Path, tmp_path: Path) -> None:
    """Each is noticed by the check alone: the tests above would pass if they did nothing."""
    for number, kind in enumerate(DAMAGES):
        cache = tmp_path / str(number)
        shutil.copytree(intact, cache)
        before = {path: path.lstat().st_mtime_ns for path in cache.iterdir()}
        damage_cache(cache, kind, "0")
        after = {path: path.lstat().st_mtime_ns for path in cache.iterdir()}
        changed = before.keys() ^ after.keys() or {path for path in before if before[path] != after[path]}
        if kind not in ("another kernel under its name", "unreadable"):
            assert not any(path.exists() and sealed.is_intact(path) for path in changed)


# ---------------------------------------------------------------- leftovers and growth


def test_killed_builds_are_removed_and_running_ones_are_not(tmp_path: Path) -> None:
    code = """
    import sys, time
    from pathlib import Path
    from clicktrain.kernels.native.folder import work_folder
    with work_folder(Path(sys.argv[1])) as work:
        (work / "kernel.c").write_text("x")
        print(work.name, flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", "\n".join(line[4:] for line in code.splitlines()), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        names = [process.stdout.readline().strip() for process in running if process.stdout]
        for name in names:
            _make_old(tmp_path / name, hours=1)
        running[0].kill()
        running[0].wait()
        cache_folders.remove_abandoned(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [names[1]]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_a_young_build_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "build-young").mkdir()
    cache_folders.remove_abandoned(tmp_path)
    assert (tmp_path / "build-young").is_dir()


def test_a_temporary_cache_ends_with_its_process(tmp_path: Path) -> None:
    """The cache cannot be used: its folder is open to others. Two processes, one of them killed."""
    shared, temporary = tmp_path / "shared", tmp_path / "temporary"
    shared.mkdir()
    shared.chmod(0o777)
    temporary.mkdir()
    code = (
        "import sys, time; from clicktrain.kernels.native.folder import cache_folder\n"
        "print(cache_folder(), flush=True); time.sleep(float(sys.argv[1]))"
    )
    environment = {**os.environ, "CLICKTRAIN_KERNEL_CACHE": str(shared), "TMPDIR": str(temporary)}

    def start(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    ended, killed = start(0), start(600)
    assert killed.stdout is not None
    folder = Path(killed.stdout.readline().strip())
    ended.communicate()
    killed.kill()
    killed.communicate()
    assert list(temporary.iterdir()) == [folder]
    _make_old(folder, hours=1)
    clean = "from pathlib import Path; from clicktrain.kernels.native.folder import tidy; tidy(Path('.'))"
    subprocess.run([sys.executable, "-c", clean], env=environment, check=True, cwd=tmp_path)
    assert list(temporary.iterdir()) == []


def test_unused_libraries_are_removed_oldest_first(tmp_path: Path) -> None:
    names = [f"{number:032x}.10.{number:032x}.so" for number in range(4)]
    plan, old_format, foreign = f"plan-{0:032x}.json", f"{9:032x}.so", "notes.txt"
    for days, name in enumerate([*names, plan, old_format, foreign]):
        (tmp_path / name).write_bytes(bytes(10))
        _make_old(tmp_path / name, hours=24 * days + 1)
    cache_folders.remove_unused(tmp_path, days=3, most=25)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[:2], foreign])
    cache_folders.remove_unused(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[:2], foreign])


def test_use_keeps_a_library(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.touch()
    _make_old(path, hours=1000)
    cache_folders.mark_used(path)
    assert time.time() - path.stat().st_mtime < 600


def _make_old(path: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))
