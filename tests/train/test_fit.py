"""Whole runs: what they leave behind, and that the settings do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from short_runs import DENSE, FIVE_STAGES, Messages, assert_same_run, run, weights
from tiny_networks import tiny

from clicktrain.errors import UserError
from clicktrain.formats.packed_file import load_packed
from clicktrain.train import RunFolder, Silent, StepProgress, from_dict, load_run
from clicktrain.train.checkpoint import load_checkpoint
from clicktrain.train.evaluate import evaluate
from clicktrain.train.fit import fit
from clicktrain.train.prepare import make_eval_loader, open_run_data, prepare


def test_a_dense_run_learns_the_digits_and_leaves_its_files(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", {**DENSE, "epochs": 4})
    assert summary["val_accuracy"] > 75
    assert summary["best_val_accuracy"] >= summary["val_accuracy"]
    assert summary["compression_ratio"] == 1
    assert summary["train_flops_ratio"] == 1
    assert summary["hard_prune_epoch"] is None
    folder = RunFolder(tmp_path / "run").open()
    assert folder.summary() == summary
    metrics = folder.read_metrics()
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert all(line["stages"] == {"dense": 1.0} for line in metrics)
    plain = tiny(10, 1)
    plain.load_state_dict(weights(tmp_path / "run"))  # keys and shapes of the plain model


@pytest.mark.parametrize("packed", [True, False])
def test_a_clicktrain_run_ends_at_the_compression_asked_for(tmp_path: Path, packed: bool) -> None:
    summary = run(tmp_path / "run", {**FIVE_STAGES, "packed": packed})
    assert summary["compression_asked"] == 4
    assert summary["compression_ratio"] == pytest.approx(4, rel=0.06)  # in steps of one kernel per filter
    assert summary["train_flops_ratio"] < 1
    assert summary["inference_flops_ratio"] < 0.5
    assert 4 < summary["hard_prune_epoch"] < 5
    folder = RunFolder(tmp_path / "run")
    stages = [event["stage"] for event in folder.read_events() if event["event"] == "stage"]
    assert stages == ["pool", "finalize", "regularize", "accelerated"]
    final = weights(tmp_path / "run")
    convolutions = [tensor for tensor in final.values() if tensor.ndim == 4]
    nonzero = sum(int(tensor.count_nonzero()) for tensor in convolutions)
    assert sum(t.numel() for t in convolutions) / nonzero == pytest.approx(summary["compression_ratio"])
    unpacked = load_packed(tmp_path / "run" / "packed.safetensors")
    assert all(torch.equal(unpacked[name], final[name]) for name in final)
    metrics = folder.read_metrics()
    assert [line["density"] for line in metrics[:4]] == [1, 1, 1, 1]
    assert metrics[-1]["density"] == pytest.approx(1 / summary["compression_ratio"])
    assert sum(line["stages"].get("accelerated", 0) for line in metrics) == pytest.approx(16 / 11, abs=0.15)


def test_packed_and_masked_training_agree(tmp_path: Path) -> None:
    for name, packed in (("packed", True), ("masked", False)):
        run(tmp_path / name, {**FIVE_STAGES, "packed": packed, "augment": "none"})
    packed_weights, masked_weights = weights(tmp_path / "packed"), weights(tmp_path / "masked")
    for name, tensor in packed_weights.items():
        torch.testing.assert_close(tensor, masked_weights[name], rtol=1e-2, atol=1e-3)


def test_flops_are_those_of_the_true_course(tmp_path: Path) -> None:
    run(tmp_path / "run", FIVE_STAGES)
    metrics = RunFolder(tmp_path / "run").read_metrics()
    per_epoch = metrics[0]["train_flops"]
    assert per_epoch > 0
    for line in metrics:
        assert line["train_flops_dense"] == line["epoch"] * per_epoch
    assert metrics[3]["train_flops"] == 4 * per_epoch  # dense up to the hard prune
    last = metrics[5]["train_flops"] - metrics[4]["train_flops"]
    assert last < 0.6 * per_epoch


def test_same_seed_same_result_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(1)  # what happened before in the process must not matter
        run(tmp_path / name, {**DENSE, "epochs": 1, "seed": seed})
    assert_same_run(tmp_path / "a", tmp_path / "b")
    first, other = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_accumulated_batches_equal_a_large_batch(tmp_path: Path) -> None:
    base = {**DENSE, "model": "tiny_networks:plain", "epochs": 2, "augment": "none", "learning_rate": 0.05}
    # 1,437 images: 22 batches of 64 and 11 of 128 use the same 1,408 in the same order.
    run(tmp_path / "large", {**base, "batch_size": 128})
    run(tmp_path / "small", {**base, "batch_size": 64, "accumulate": 2})
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    for name in large:
        torch.testing.assert_close(large[name], small[name], rtol=1e-3, atol=1e-5)


def test_an_unfinished_group_of_batches_makes_a_step_of_its_own(tmp_path: Path) -> None:
    steps: list[int] = []

    class Count(Silent):
        def step(self, info: StepProgress) -> None:
            steps.append(info.step)

    run(tmp_path / "run", {**DENSE, "epochs": 1, "accumulate": 4}, Count())
    assert steps == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]  # 11 batches: 4, 4 and 3


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "learning_rate": 3e-3, "decay_norm_and_bias": False},
        {"schedule": "onecycle", "label_smoothing": 0.1, "clip_grad_norm": 1.0},
        {"mixup": 0.2, "cutout": 2, "augment": "digits"},
        {"precision": "bf16", "channels_last": True},
        {"optimizer": "adamw", "learning_rate": 3e-3, "accumulate": 2, "ema_decay": 0.9},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_ingredient_works_with_pruning(tmp_path: Path, settings: dict[str, object]) -> None:
    summary = run(tmp_path / "run", {**FIVE_STAGES, "epochs": 4, **settings})
    assert summary["val_accuracy"] > 15  # ten classes, a few dozen steps: far from guessing
    assert summary["compression_ratio"] == pytest.approx(4, rel=0.06)


def test_fp16_scales_the_loss_and_survives_overflow(tmp_path: Path) -> None:
    scales: list[float] = []

    class Scale(Silent):
        def start(self, config: Any, method: Any, prepared: Any) -> None:
            self.scheduler = prepared.scheduler

        def step(self, info: StepProgress) -> None:
            scales.append(self.scheduler.last_epoch)

    settings = {**DENSE, "epochs": 1, "precision": "fp16", "batch_size": 256, "ema_decay": 0.5}
    summary = run(tmp_path / "run", settings, Scale())
    assert scales == [
        1,
        2,
        3,
        4,
        5,
    ]  # a step that overflowed counts in the schedule
    assert summary["val_accuracy"] > 8
    state = load_checkpoint(RunFolder(tmp_path / "run").checkpoints()[-1])
    assert state["scaler"]["scale"] > 1


def test_a_run_too_coarse_for_its_stages_still_ends_pruned(tmp_path: Path) -> None:
    # One optimizer step per epoch: the stages are not over when the run is.
    messages = Messages()
    summary = run(
        tmp_path / "run", {**FIVE_STAGES, "accumulate": 11, "epochs": 3, "ema_decay": 0.5}, messages
    )
    assert "pruned after the last epoch" in messages.messages[0]
    assert summary["compression_ratio"] == pytest.approx(4, rel=0.06)
    loaded = load_run(tmp_path / "run", model=tiny)
    loader = make_eval_loader(loaded.config, open_run_data(loaded.config), "val", torch.device("cpu"))
    result = evaluate(loaded.model, loader, device=torch.device("cpu"))
    assert result is not None
    assert result.accuracy == pytest.approx(summary["val_accuracy"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", FIVE_STAGES)
    compiled = run(tmp_path / "compiled", {**FIVE_STAGES, "compile": True})
    assert compiled["compression_ratio"] == plain["compression_ratio"]
    losses = [
        [r["train_loss"] for r in RunFolder(tmp_path / n).read_metrics()] for n in ("plain", "compiled")
    ]
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=0.05)
    assert compiled["val_accuracy"] > 20


def test_evaluation_every_k_epochs_and_at_the_end(tmp_path: Path) -> None:
    run(tmp_path / "run", {**DENSE, "epochs": 5, "evaluate_every": 2})
    accuracies = [line["val_accuracy"] for line in RunFolder(tmp_path / "run").read_metrics()]
    assert [value is not None for value in accuracies] == [False, True, False, True, True]


def test_the_average_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    settings = {**DENSE, "learning_rate": 0.3, "schedule": "constant"}
    run(tmp_path / "live", settings)
    averaged = run(tmp_path / "average", {**settings, "ema_decay": 0.99})
    live, average = weights(tmp_path / "live"), weights(tmp_path / "average")
    assert not torch.equal(live["0.weight"], average["0.weight"])
    # Training itself is not changed by averaging.
    lines = [RunFolder(tmp_path / name).read_metrics() for name in ("live", "average")]
    assert [a["train_loss"] for a in lines[0]] == [b["train_loss"] for b in lines[1]]
    assert averaged["val_accuracy"] == lines[1][-1]["val_accuracy"]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    run(tmp_path / "run", {**DENSE, "epochs": 4, "keep_checkpoints": 3})
    names = [path.name for path in RunFolder(tmp_path / "run").checkpoints()]
    assert names == [f"step-{11 * epoch:09d}-epoch-{epoch:04d}.safetensors" for epoch in (2, 3, 4)]


def test_prepare_writes_nothing_and_shows_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = prepare(*from_dict(FIVE_STAGES))
    assert "compression asked 4" in str(prepared.pruner.plan())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "resnet21"}, "unknown model"),
        ({"model": "tiny_networks:wrong_outputs"}, r"gives \(1, 11\) for one image: \(1, 10\) is needed"),
        ({"model": "tiny_networks:wrong_input"}, r"does not take images of shape \(1, 8, 8\)"),
        ({"model": "tiny_networks:frozen_network"}, "no parameter to train"),
        ({"device": "cuda"}, "device is 'cuda', which PyTorch does not find here"),
        ({"cutout": 9}, "at most 8 makes sense"),
        ({"method": "clicktrain", "compression": 1000}, "compression"),
        (
            {"method": "clicktrain", "compression": 4, "epochs": 6, "model": "tiny_networks:reflecting"},
            r"3 cannot be packed: .*reflect.*set packed to false",
        ),
        ({"model": "vgg11", "stem": "imagenet", "width": 0.05}, "needs images of at least 32 pixels"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    tmp_path: Path, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(tmp_path / "run", {**DENSE, **settings})
    assert not (tmp_path / "run").exists()


def test_several_outputs_in_training_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="auxiliary gives a tuple in training mode: let it return"):
        run(tmp_path / "run", {**DENSE, "model": "tiny_networks:auxiliary"})


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: give another --out"):
        run(tmp_path / "notes", DENSE)
    run(tmp_path / "run", {**DENSE, "epochs": 1})
    with pytest.raises(UserError, match="clicktrain resume"):
        run(tmp_path / "run", DENSE)


def test_tensorboard_is_optional(tmp_path: Path) -> None:
    from importlib.util import find_spec

    settings = {**DENSE, "epochs": 1, "tensorboard": True}
    if find_spec("tensorboard") is None:
        with pytest.raises(UserError, match="pip install tensorboard"):
            run(tmp_path / "run", settings)
    else:
        run(tmp_path / "run", settings)
        assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_a_folder_given_as_text_and_weights_that_load_by_themselves(tmp_path: Path) -> None:
    fit(*from_dict({**DENSE, "epochs": 1}), str(tmp_path / "run"))
    assert load_file(tmp_path / "run" / "model.safetensors").keys() == tiny(10, 1).state_dict().keys()
