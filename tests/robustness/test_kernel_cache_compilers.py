"""Compilers and disks that fail: the network computes the same, with one warning that names the cause."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from kernel_faults import (
    MISBEHAVIOURS,
    NONSENSE,
    SOME_FAIL,
    Case,
    Outcome,
    fake_compiler,
    run_cases,
)

from clicktrain.kernels.native import toolchain

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(toolchain() is None, reason="there is no C compiler"),
]

SECONDS = "3"
"""Time limit of a compilation by what hangs; a busy machine takes longer for others."""
HELP = r"install gcc or clang|name another compiler in CC|set CLICKTRAIN_\w+|free some space"
CAUSES = {
    "fails": "error: no more",
    "is killed": "was killed by SIGKILL",
    "crashes": "was killed by SIGSEGV",
    "hangs": "did not finish within 3 s",
    "hangs in a child": "did not finish within 3 s",
    "prints without end": "printed without end",
    "writes nothing": "writes no library",
    "writes an empty file": "cannot be loaded",
    "writes garbage": "cannot be loaded",
    "writes half a library": "crashes|cannot be loaded",
    "writes a zeroed library": "crashes|cannot be loaded",
    "writes a library without functions": "cannot be loaded .*clicktrain_identity",
    "writes to a folder of that name": "writes no library",
}
VALUES = {
    "CC=true": ("/bin/true", "/bin/true writes no library"),
    "CC=false": ("/bin/false", "/bin/false ended with code 1"),
    "CC does not exist": (
        "no-such-compiler -O3",
        "'no-such-compiler -O3' names a program that does not exist",
    ),
    "CC is a folder": ("/tmp", "'/tmp' names a program that does not exist"),
    "CC is no program": (str(Path(__file__).resolve()), "names a program that does not exist"),
    "CC is Python": ("python3", "python3 ended with code 2"),
    "CC has an open quotation": ("gcc '-O2", "a quotation is not closed"),
    "CC has flags that it refuses": (
        "gcc -fno-such-flag",
        "gcc -fno-such-flag ended with code 1 .*no-such-flag",
    ),
}
SIZES = {
    "full at once": (1000, "cannot be written .File too large.*temporary folder"),
    "full at the self-test": (9000, "cannot be written"),
    "full at a kernel": (18000, "cannot be written"),
}
MOUNTS = {
    "disk full at the self-test": ("4k", "cannot be written .No space"),
    "disk full at a kernel": ("40k", "cannot be written .No space"),
    "noexec, everywhere": ("noexec", "noexec.*temporary folder.*noexec"),
}
CASES = [f"{kind}, {scope}" for kind in MISBEHAVIOURS for scope in ("everything", "kernels")]
CASES += [*VALUES, *SIZES, *MOUNTS, "CC computes nonsense", "no compiler"]
OFTEN = {
    "is killed, everything", "writes garbage, everything", "fails, kernels", "hangs, kernels",
    "writes half a library, kernels", "writes a library without functions, kernels", "CC=true",
    "CC computes nonsense", "no compiler", "disk full at a kernel", "full at a kernel", "noexec, everywhere",
}  # fmt: skip
"""Cases that are tried each time; the others are slow tests."""


def environment_of(base: Path, name: str, **changes: str | None) -> dict[str, str | None]:
    """With an empty cache of its own."""
    folder = base / re.sub(r"\W", "-", name)
    return {"CLICKTRAIN_KERNEL_CACHE": str(folder), **changes}


def case_of(base: Path, name: str) -> Case:
    """One of `CASES`, in a folder."""
    changes: dict[str, str | None] = {}
    case = Case("accelerate")
    if name in VALUES:
        changes["CC"] = VALUES[name][0]
    elif name in SIZES:
        case.file_size = SIZES[name][0]
    elif name in MOUNTS:
        case.mount = (str(base), MOUNTS[name][0])
        changes["TMPDIR"] = str(base)
    elif name == "no compiler":
        changes.update(CC=None, PATH=str(base))
    else:
        kind, _, scope = name.partition(", ")
        body = NONSENSE if name == "CC computes nonsense" else MISBEHAVIOURS[kind]
        script = base / re.sub(r"\W", "-", f"cc {name}")
        changes["CC"] = str(fake_compiler(script, body, kernels_only=scope == "kernels"))
        if kind.startswith("hangs"):
            changes["CLICKTRAIN_COMPILE_SECONDS"] = SECONDS
    case.environment = environment_of(base, name, **changes)
    return case


def cause_of(name: str) -> str:
    """What its warning has to say, as a pattern."""
    for table in (VALUES, SIZES, MOUNTS):
        if name in table:
            return str(table[name][1])
    rest = {
        "CC computes nonsense": "makes a library that computes nonsense",
        "no compiler": "there is no C compiler",
    }
    return rest.get(name) or CAUSES[name.partition(",")[0]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compilers")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, base: Path) -> dict[str, Outcome]:
    """Of the cases that are selected in this test run."""
    return run_selected(request, {name: case_of(base, name) for name in CASES})


def run_selected(request: pytest.FixtureRequest, cases: Mapping[str, Case]) -> dict[str, Outcome]:
    """those that a test of this run, by its parameter ``case_name``, looks at."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = {item.callspec.params.get("case_name") for item in items if hasattr(item, "callspec")}
    with tempfile.TemporaryDirectory() as answers:
        return run_cases({name: case for name, case in cases.items() if name in names}, Path(answers))


def params(names: Iterable[str], often: Collection[str]) -> list[ParameterSet]:
    """Parameters of which some are slow tests."""
    return [pytest.param(name, marks=() if name in often else pytest.mark.slow) for name in names]


REFERENCE = {"same": True, "accelerated": False, "blocked": []}


def check_reference(outcome: Outcome, cause: str) -> None:
    """The packed model as it was, and one warning."""
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert (outcome.signal, outcome.error) == (0, "")
    assert outcome.result == REFERENCE
    assert len(outcome.warnings) == 1
    text = outcome.warnings[0]
    assert text.startswith("the packed model runs on the reference operator: ")
    assert re.search(cause, text)
    assert re.search(HELP, text)
    assert "\n" not in text


@pytest.mark.parametrize("case_name", params(CASES, OFTEN))
def test_the_reference_operator_and_one_warning(outcomes: dict[str, Outcome], case_name: str) -> None:
    check_reference(outcomes[case_name], cause_of(case_name))


def test_nothing_is_left_behind(outcomes: dict[str, Outcome], base: Path) -> None:
    assert outcomes
    left = [path for path in base.rglob("*") if path.name.startswith("build-") or path.suffix == ".tmp"]
    assert left == []


# ---------------------------------------------------------------- what still works


COMPILERS = {
    "with flags": "gcc -O1 -fno-strict-aliasing",
    "behind another program": "env gcc",
    "blank": "  ",
}
PATTERNS = {"some kernels": "EACH_SUM", "batch norm": "centered_sums", "conversions": "by_column"}
"""Taps as data, which the second convolution takes by rule; the passes of batch norm; both conversions."""
PARTLY = [f"{name}, {rule}" for name in PATTERNS for rule in ("sparse", "measured")]
FOLDERS: dict[str, dict[str, str | None]] = {
    "no home": {"HOME": None, "CLICKTRAIN_KERNEL_CACHE": None, "XDG_CACHE_HOME": "{base}"},
    "TMPDIR is missing": {"TMPDIR": "/nowhere"},
}
TEMPORARY = {
    "noexec": "noexec",
    "read-only": "Read-only",
    "a file as home": "Not a directory",
    "open to others": "can be written to by others",
}
BLOCKED = {"same": True, "accelerated": True, "blocked": ["0", "3"]}


@pytest.fixture(scope="module")
def working(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    base = tmp_path_factory.mktemp("working")
    cases = {}
    for name, value in COMPILERS.items():
        cases[name] = Case("accelerate", environment=environment_of(base, name, CC=value))
    for name in PARTLY:
        pattern, _, rule = name.partition(", ")
        script = SOME_FAIL.format(pattern=PATTERNS[pattern])
        compiler = fake_compiler(base / name.replace(" ", "-"), script, kernels_only=True)
        cases[name] = Case("accelerate", [rule], environment_of(base, f"{name} cache", CC=str(compiler)))
    for name, changes in FOLDERS.items():
        own = {key: value and value.format(base=base) for key, value in changes.items()}
        cases[name] = Case("accelerate", environment=environment_of(base, name) | own)
    for name in ("noexec", "read-only"):
        mount = (str(base), "ro" if name == "read-only" else name)
        cases[name] = Case("accelerate", environment=environment_of(base, "mounted"), mount=mount)
    home: dict[str, str | None] = {
        "HOME": "/dev/null",
        "CLICKTRAIN_KERNEL_CACHE": None,
        "XDG_CACHE_HOME": None,
    }
    cases["a file as home"] = Case("accelerate", environment=home)
    shared = base / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    cases["open to others"] = Case("accelerate", environment={"CLICKTRAIN_KERNEL_CACHE": str(shared)})
    cases["a limit of words"] = Case("accelerate", environment={"CLICKTRAIN_COMPILE_SECONDS": "soon"})
    return run_selected(request, cases)


@pytest.mark.parametrize("case_name", params([*COMPILERS, *FOLDERS], ["with flags", "no home"]))
def test_it_works_all_the_same(working: dict[str, Outcome], case_name: str) -> None:
    outcome = working[case_name]
    assert (outcome.signal, outcome.error, outcome.warnings) == (0, "", [])
    assert outcome.result == BLOCKED


@pytest.mark.parametrize("case_name", params(TEMPORARY, ["noexec"]))
def test_a_temporary_cache_with_a_warning(working: dict[str, Outcome], case_name: str) -> None:
    outcome = working[case_name]
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert (outcome.signal, outcome.error) == (0, "")
    assert outcome.result == BLOCKED
    assert len(outcome.warnings) == 1
    pattern = f"{TEMPORARY[case_name]}.*rebuilt by each process: set CLICKTRAIN_KERNEL_CACHE"
    assert re.search(pattern, outcome.warnings[0])


@pytest.mark.parametrize("case_name", params(PARTLY, ["some kernels, measured", "batch norm, sparse"]))
def test_only_what_fails_is_not_chosen(working: dict[str, Outcome], case_name: str) -> None:
    name, _, rule = case_name.partition(", ")
    outcome = working[case_name]
    if name == "conversions":  # nothing goes without them
        check_reference(outcome, "error: internal")
        return
    assert (outcome.signal, outcome.error) == (0, "")
    assert outcome.result["same"]
    if rule == "sparse":
        assert outcome.result["blocked"] == (["0"] if name == "some kernels" else ["0", "3"])
    assert len(outcome.warnings) == 1
    assert re.search("generated kernels? cannot be used here: .*error: internal", outcome.warnings[0])


@pytest.mark.parametrize("case_name", ["a limit of words"])
def test_a_time_limit_that_is_none(working: dict[str, Outcome], case_name: str) -> None:
    assert "UserError: CLICKTRAIN_COMPILE_SECONDS is 'soon'" in working[case_name].error
