"""Two processes train as one does: the same decisions, the same weights, one folder."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from several_processes import OTHERS, PARTS, norm, normed
from start_processes import run_together

from clicktrain.methods import METHODS

SCRIPT = Path(__file__).parent / "several_processes.py"
TIMES = ("seconds", "step_ms", "data_share", "train_seconds", "total_train_seconds")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method, by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    run_together(SCRIPT, 1, folder, *METHODS)
    run_together(SCRIPT, 2, folder, *METHODS, *OTHERS)
    return folder


def lines_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def decisions(path: Path) -> list[dict[str, Any]]:
    """Events without measured times and without what rounding changes."""
    return [
        {k: v for k, v in line.items() if k not in TIMES and not isinstance(v, float | list | dict)}
        for line in lines_of(path, "events")
    ]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_decide_and_learn_as_one(name: str, trained: Path) -> None:
    one, two = trained / f"{name}-1", trained / f"{name}-2"
    assert decisions(two) == decisions(one)
    expected, weights = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert weights[key].shape == value.shape
        if value.dim() == 4:
            assert bool(((weights[key] != 0) == (value != 0)).all()), f"other weights of {key} are kept"
        difference = float((weights[key].double() - value.double()).abs().max())
        # Norms amplify what rounding changed, and their statistics are sums of it over the steps.
        assert difference <= (2e-3 if value.dim() > 1 else 5e-2) * max(float(value.abs().max()), 1), key
    summaries = [json.loads((trained / f"{name}-{p}-0.json").read_text()) for p in (1, 2)]
    for figure in ("train_flops", "inference_flops", "compression_ratio", "parameters", "epochs"):
        assert summaries[1][figure] == pytest.approx(summaries[0][figure], rel=1e-6), figure
    for ours, theirs in zip(lines_of(two, "metrics"), lines_of(one, "metrics"), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert ours["batch_size"] == theirs["batch_size"]
        assert ours["stages"] == theirs["stages"]


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_all_processes_know_the_same_end(name: str, trained: Path) -> None:
    first, other = (json.loads((trained / f"{name}-2-{rank}.json").read_text()) for rank in (0, 1))
    known = [key for key in first if key not in TIMES and key != "layers"]
    assert {key: other[key] for key in known} == {key: first[key] for key in known}


def sent_in(run: Path) -> list[tuple[int, dict[str, int]]]:
    """Optimizer steps of each epoch, and the bytes exchanged by purpose."""
    lines = lines_of(run, "metrics")
    for line in lines:
        assert line["exchange_bytes"] == sum(row["bytes"] for row in line["exchange"].values())
        assert line["exchange_calls"] == sum(row["calls"] for row in line["exchange"].values())
    return [(x["exchange_steps"], {k: row["bytes"] for k, row in x["exchange"].items()}) for x in lines]


def test_gradients_of_packed_weights_are_all_that_travels_after_the_hard_prune(trained: Path) -> None:
    run = trained / "clicktrain-2"
    summary = json.loads((run / "summary.json").read_text())
    steps, last = sent_in(run)[-1]
    assert last["gradients"] == 4 * summary["nonzero_parameters"] * steps
    steps, first = sent_in(run)[0]
    assert first["gradients"] == 4 * summary["dense_parameters"] * steps
    assert set(first) == {"gradients", "norms", "agreement"}  # synchronized norms need no buffers sent
    assert summary["exchange_steps"] == 16
    assert summary["exchange_bytes"] == sum(line["exchange_bytes"] for line in lines_of(run, "metrics"))
    assert summary["exchange_ratio"] == pytest.approx(
        summary["exchange"]["gradients"]["bytes"] / (4 * summary["dense_parameters"] * 16)
    )
    assert not any("exchange_bytes" in line for line in lines_of(trained / "clicktrain-1", "metrics"))
    steps, rounded = sent_in(trained / "rounded-2")[0]
    assert rounded["gradients"] == 2 * summary["dense_parameters"] * steps


def test_masked_dense_weights_send_kept_positions_to_the_same_effect(trained: Path) -> None:
    kept, dense = (trained / f"{name}-2" for name in ("masked", "masked-dense"))
    assert decisions(kept) == decisions(dense)
    weights, expected = load_file(kept / "model.safetensors"), load_file(dense / "model.safetensors")
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)
    summary = json.loads((kept / "summary.json").read_text())
    for (steps, sent), (_, all_of_them) in zip(sent_in(kept), sent_in(dense), strict=True):
        assert sent["gradients"] == 4 * summary["nonzero_parameters"] * steps
        assert all_of_them["gradients"] == 4 * summary["dense_parameters"] * steps
        assert sent["buffers"] == all_of_them["buffers"] > 0
    assert sent_in(kept)[0][1]["growth"] > 0  # units move in the first epoch, by the gradients of all


def test_the_plan_says_what_is_exchanged(trained: Path) -> None:
    run = trained / "moving-2"
    rows = json.loads((run / "operators-moving.json").read_text())["exchange"]
    steps, sent = sent_in(run)[-1]
    assert sent["gradients"] == 4 * sum(row["sent"] for row in rows) * steps
    assert {row["how"] for row in rows} == {"all", "kept values"}


@pytest.mark.parametrize("affine", [True, False])
def test_synchronized_norms_are_those_of_the_whole_batch(affine: bool, trained: Path) -> None:
    expected = normed(norm(affine), slice(None))
    parts = [torch.load(trained / f"norm-{rank}.pt")[0 if affine else 1] for rank in (0, 1)]
    for rank, part in enumerate(parts):
        for name in ("output", "x"):
            torch.testing.assert_close(part[name], expected[name][PARTS[rank]], rtol=1e-9, atol=1e-9)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(part[name], expected[name], rtol=1e-9, atol=1e-9)
    for name in ("weight", "bias") if affine else ():
        torch.testing.assert_close(parts[0][name] + parts[1][name], expected[name], rtol=1e-9, atol=1e-9)


def test_only_the_first_process_writes_the_folder(trained: Path) -> None:
    files = {path.name for path in (trained / "clicktrain-2").iterdir()}
    assert files >= {"config.yaml", "metrics.jsonl", "events.jsonl", "model.safetensors", "summary.json"}
    epochs = [line["epoch"] for line in lines_of(trained / "clicktrain-2", "metrics")]
    assert epochs == [1, 2, 3, 4]


def test_a_signal_during_evaluation_stops_all_processes(trained: Path) -> None:
    """It comes to the second process alone, in its first evaluation of a trained network."""
    stopped = [json.loads((trained / f"stopped-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["signum"] for one in stopped] == [signal.SIGTERM] * 2
    assert "stopped in epoch 1 after batch 4 of 4; state saved in" in stopped[0]["message"]
    assert [path.name for path in sorted((trained / "stopped" / "checkpoints").iterdir())][-1].startswith(
        "step-000000004"
    )
