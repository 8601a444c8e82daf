"""Runs and benchmarks with a broken compiler or a damaged cache: trained to the end, or one sentence."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from kernel_faults import MISBEHAVIOURS, Case, Outcome, fake_compiler, run_cases

from clicktrain.kernels.native import toolchain

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(toolchain() is None, reason="there is no C compiler"),
]

SETTINGS: dict[str, Any] = {
    "model": "tiny_networks:tiny",
    "method": "clicktrain",
    "compression": 4,
    "epochs": 5,
    "threads": 1,
    "operators": "sparse",
    "learning_rate": 0.05,
    "earliest_start": 0.2,
    "latest_start": 0.2,
    "pool_length": 0.15,
    "finalize_length": 0.15,
    "regularize_length": 0.15,
}
STOP = 50
"""A batch of the run behind its hard prune."""
SLOW_KINDS = [kind for kind in MISBEHAVIOURS if kind not in ("fails", "prints without end")]


def one(case: Case) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return run_cases({"it": case}, Path(folder))["it"]


def environment_of(cache: Path, **changes: str | None) -> dict[str, str | None]:
    return {"CLICKTRAIN_KERNEL_CACHE": str(cache), **changes}


def limit_of(kind: str) -> dict[str, str | None]:
    """A short time limit for compilers that hang."""
    return {"CLICKTRAIN_COMPILE_SECONDS": "3"} if kind.startswith("hangs") else {}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``run``, stopped behind the hard prune, its ``cache``, and the same run ``whole``."""
    base = tmp_path_factory.mktemp("stopped")
    cases = {
        "run": Case("train", [str(base / "run"), SETTINGS, STOP], environment_of(base / "cache")),
        "whole": Case("train", [str(base / "whole"), SETTINGS], environment_of(base / "cache")),
    }
    for outcome in run_cases(cases, base).values():
        assert (outcome.signal, outcome.error) == (0, "")
    operators = json.loads((base / "run" / "operators.json").read_text())
    assert any(choice["layout"] == "blocked" for choice in operators["choices"])
    return base


def copy_of(stopped: Path, base: Path) -> Path:
    shutil.copytree(stopped, base / "copy")
    return base / "copy"


def check_trained(outcome: Outcome, path: Path, cause: str | None) -> None:
    """The run came to its end; what it said of its operators, once."""
    assert (outcome.signal, outcome.error) == (0, "")
    assert outcome.result["summary"]["val_accuracy"] > 20
    assert (path / "packed.safetensors").is_file()
    said = [text for text in outcome.result["messages"] if "reference operator" in text]
    if cause is None:
        assert said == []
    else:
        assert len(said) == 1
        assert re.search(cause, said[0])


def test_train_with_a_compiler_that_does_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    environment = environment_of(tmp_path / "cache", CC="/bin/true")
    check_trained(one(Case("train", [str(path), SETTINGS], environment)), path, "/bin/true writes no library")
    assert not (path / "operators.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut to a half", "zeroed"])
def test_resume_with_damaged_libraries(stopped: Path, tmp_path: Path, kind: str) -> None:
    """It goes on as if nothing had happened, bit for bit."""
    base = copy_of(stopped, tmp_path)
    case = Case("resume", [str(base / "run")], environment_of(base / "cache"), damage=(kind, "all"))
    check_trained(one(case), base / "run", None)
    weights = [base / name / "model.safetensors" for name in ("run", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("fails", *SLOW_KINDS)]
)
def test_resume_with_a_compiler_that_misbehaves(stopped: Path, tmp_path: Path, kind: str) -> None:
    """The run's own operators cannot be built any more, nor are they in the cache."""
    base = copy_of(stopped, tmp_path)
    compiler = fake_compiler(tmp_path / "cc", MISBEHAVIOURS[kind], kernels_only=True)
    environment = environment_of(tmp_path / "empty", CC=str(compiler), **limit_of(kind))
    check_trained(one(Case("resume", [str(base / "run")], environment)), base / "run", "generated kernel")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW_KINDS)
@pytest.mark.parametrize("rule", ["measured", "density"])
def test_train_with_a_compiler_that_misbehaves(tmp_path: Path, kind: str, rule: str) -> None:
    compiler = fake_compiler(tmp_path / "cc", MISBEHAVIOURS[kind], kernels_only=True)
    environment = environment_of(tmp_path / "cache", CC=str(compiler), **limit_of(kind))
    outcome = one(Case("train", [str(tmp_path / "run"), {**SETTINGS, "operators": rule}], environment))
    check_trained(outcome, tmp_path / "run", "generated kernel")


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        "\udc80",
        '{"choices": [], "machine": {}}',
        "cut",
        "batch",
        "density",
        "tilings",
        "machine",
        "depth",
    ],
)
def test_resume_with_a_damaged_plan(stopped: Path, tmp_path: Path, damage: str) -> None:
    """Refused in a sentence that names the file: the run would else go on with other operators."""
    base = copy_of(stopped, tmp_path)
    path = base / "run" / "operators.json"
    text = path.read_text()
    plan = json.loads(text)
    changes: dict[str, Any] = {
        "batch": {"batch": "many"},
        "density": {"choices": [{**choice, "density": "half"} for choice in plan["choices"]]},
        "tilings": {"choices": [{**choice, "tilings": [["forward", 7]]} for choice in plan["choices"]]},
        "machine": {"machine": [1, 2]},
    }
    if damage in changes:
        damage = json.dumps(plan | changes[damage])
    elif damage == "cut":
        damage = text[: len(text) // 2]
    elif damage == "depth":
        damage = "[" * 100_000
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    from clicktrain.compiler import LoweringPlan
    from clicktrain.errors import UserError

    with pytest.raises(
        UserError, match=r"operators\.json: this is no lowering plan|operators\.json is damaged"
    ):
        LoweringPlan.read(path)


# ---------------------------------------------------------------- benchmarks

BENCHMARKS = {
    "conv": ("bench", "conv", "--shapes", "4,4,4", "--compression", "4", "--rounds", "1", "--no-tune"),
    "step": ("bench", "step", "--model", "vgg11", "--image-size", "32", "--batch-size", "2", "--rounds", "1",
             "--rule", "sparse", "--no-memory"),
}  # fmt: skip


def check_refused(outcome: Outcome, cause: str) -> None:
    assert (outcome.signal, outcome.error) == (0, "")
    assert outcome.result["code"] == 2
    assert re.search(cause, outcome.result["err"])
    assert "Traceback" not in outcome.result["err"]
    assert len([line for line in outcome.result["err"].splitlines() if line.strip()]) == 1


@pytest.mark.parametrize("name", ["conv", pytest.param("step", marks=pytest.mark.slow)])
def test_benchmarks_refuse_in_a_sentence(tmp_path: Path, name: str) -> None:
    compiler = fake_compiler(tmp_path / "cc", MISBEHAVIOURS["fails"], kernels_only=True)
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            cc: Case("command line", list(BENCHMARKS[name]), environment_of(tmp_path / "cache", CC=cc))
            for cc in ("/bin/true", str(compiler))
        }
        outcomes = run_cases(cases, Path(folder))
    check_refused(
        outcomes["/bin/true"], "sparse kernels cannot be built: the C compiler /bin/true writes no library"
    )
    check_refused(outcomes[str(compiler)], "refused a generated kernel .*error: no more")


def test_bench_runs_refuses_in_a_sentence(stopped: Path, tmp_path: Path) -> None:
    environment = environment_of(tmp_path / "cache", CC="/bin/true")
    arguments = ["bench", "runs", "--runs", str(stopped / "whole"), "--rounds", "1", "--batch-size", "4"]
    arguments += ["--model", SETTINGS["model"]]  # its code is named, not taken from the run
    outcome = one(Case("command line", arguments, environment))
    check_refused(outcome, "sparse kernels cannot be built: the C compiler /bin/true writes no library")
