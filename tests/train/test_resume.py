"""A run that is killed, anywhere, and resumed is the run that was never killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from short_runs import (
    BATCH_IN_STAGE,
    DENSE,
    FIVE_STAGES,
    At,
    Killed,
    Messages,
    assert_same_run,
    kill,
    resume,
    run,
    run_in_process,
)

from clicktrain.errors import UserError
from clicktrain.runs.format import FORMAT_VERSION
from clicktrain.train import RunFolder, TrainingInterrupted

STAGES = tuple(BATCH_IN_STAGE)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run(path, FIVE_STAGES)
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_each_stage(tmp_path: Path, whole: Path, stage: str) -> None:
    progress = At(BATCH_IN_STAGE[stage], kill)
    with pytest.raises(Killed):
        run(tmp_path / "run", FIVE_STAGES, progress)
    assert progress.stage == stage
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_what_is_done_again_is_not_told_twice(tmp_path: Path, whole: Path) -> None:
    settings = {**FIVE_STAGES, "checkpoint_every": 3}
    with pytest.raises(Killed):
        run(tmp_path / "run", settings, At(60, kill))
    folder = RunFolder(tmp_path / "run")
    assert len(folder.read_metrics()) == 5  # two of them after the last checkpoint
    assert "hard_prune" in [event["event"] for event in folder.read_events()]
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("stage", STAGES)
def test_asked_to_stop_in_each_stage(tmp_path: Path, whole: Path, stage: str) -> None:
    progress = At(BATCH_IN_STAGE[stage], lambda: send(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match="clicktrain resume") as stopped:
        run(tmp_path / "run", FIVE_STAGES, progress)
    assert stopped.value.exit_code == 143
    assert progress.stage == stage
    epoch, batch = divmod(BATCH_IN_STAGE[stage], 11)
    assert f"in epoch {epoch + 1} after batch {batch} of 11" in str(stopped.value)
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.long
def test_sigkill_of_a_real_process(tmp_path: Path, whole: Path) -> None:
    killed = run_in_process(tmp_path / "run", FIVE_STAGES, BATCH_IN_STAGE["accelerated"], signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.long
def test_sigterm_of_a_real_process(tmp_path: Path, whole: Path) -> None:
    stopped = run_in_process(tmp_path / "run", FIVE_STAGES, BATCH_IN_STAGE["finalize"], signal.SIGTERM)
    assert stopped.returncode == 143, stopped.stderr
    assert "continue with 'clicktrain resume" in stopped.stderr
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packed": False, "optimizer": "adamw", "learning_rate": 3e-3},
        {"precision": "fp16", "ema_decay": 0.95, "accumulate": 2, "mixup": 0.2},
        {"preset": "paper", "precision": "bf16", "channels_last": True, "schedule": "onecycle"},
    ],
    ids=["plain", "masked-adamw", "fp16-average-accumulate", "paper-bf16"],
)
def test_sigkill_in_each_stage(tmp_path: Path, stage: str, settings: dict[str, Any]) -> None:
    settings = {**FIVE_STAGES, **settings}
    run(tmp_path / "whole", settings)
    killed = run_in_process(tmp_path / "run", settings, BATCH_IN_STAGE[stage], signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "settings",
    [
        {"packed": False, "optimizer": "adamw", "learning_rate": 3e-3, "clip_grad_norm": 1.0},
        {"ema_decay": 0.95, "mixup": 0.2, "schedule": "onecycle"},
    ],
    ids=["masked-adamw", "average-mixup"],
)
def test_stopped_twice_with_other_ingredients(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {**FIVE_STAGES, **settings}
    run(tmp_path / "whole", settings)
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "run", settings, At(38, lambda: send(signal.SIGINT)))
    with pytest.raises(TrainingInterrupted):
        resume(tmp_path / "run", At(52, lambda: send(signal.SIGINT)))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_signal_inside_a_group_waits_for_the_optimizer_step(tmp_path: Path) -> None:
    settings = {**DENSE, "accumulate": 4}
    run(tmp_path / "whole", settings)
    with pytest.raises(TrainingInterrupted, match="in epoch 2 after batch 8 of 11"):
        run(tmp_path / "run", settings, At(11 + 6, lambda: send(signal.SIGTERM)))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_signal_at_the_end_of_an_epoch_interrupts_before_evaluation(tmp_path: Path) -> None:
    run(tmp_path / "whole", DENSE)
    with pytest.raises(TrainingInterrupted, match="in epoch 1 after batch 11 of 11") as stopped:
        run(tmp_path / "run", DENSE, At(11, lambda: send(signal.SIGINT)))
    assert stopped.value.exit_code == 130
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "whole", DENSE)
    with pytest.raises(Killed):
        run(tmp_path / "run", DENSE, At(3, kill))
    for path in RunFolder(tmp_path / "run").checkpoints():
        path.unlink()
    messages = Messages()
    resume(tmp_path / "run", messages)
    assert messages.messages == ["no checkpoint was written yet: starting from the beginning"]
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_killed_between_the_last_epoch_and_the_final_files(tmp_path: Path, whole: Path) -> None:
    run(tmp_path / "run", FIVE_STAGES)
    folder = RunFolder(tmp_path / "run")
    folder.summary_path.unlink()
    folder.model.unlink()
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_has_nothing_to_resume(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", {**DENSE, "epochs": 1})
    messages = Messages()
    assert resume(tmp_path / "run", messages) == summary
    assert "finished already" in messages.messages[0]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[-9] ^= 0x40  # one bit of one weight: the file still opens
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, whole: Path, how: str) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", FIVE_STAGES, At(60, kill))
    damage(RunFolder(tmp_path / "run").checkpoints()[-1], how)
    messages = Messages()
    resume(tmp_path / "run", messages)
    assert len(messages.messages) == 1
    assert "epoch-0005.safetensors is damaged" in messages.messages[0]
    assert "going back" in messages.messages[0]
    assert_same_run(tmp_path / "run", whole)


def test_no_checkpoint_left_that_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", DENSE, At(13, kill))
    for path in RunFolder(tmp_path / "run").checkpoints():
        damage(path, "cut")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read: start the run again"):
        resume(tmp_path / "run")


def test_a_checkpoint_of_another_version_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", DENSE, At(13, kill))
    newest = RunFolder(tmp_path / "run").checkpoints()[-1]
    with safe_open(newest, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, newest, {**metadata, "format_version": "1"})
    with pytest.raises(UserError, match=r"has format 1, .* start the run again, or use an older one"):
        resume(tmp_path / "run")
    save_file(tensors, newest, {**metadata, "format_version": "9"})
    with pytest.raises(UserError, match=r"has format 9, .* update clicktrain"):
        resume(tmp_path / "run")


def test_settings_that_shape_the_run_cannot_change_on_resume(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", DENSE, At(13, kill))
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("learning_rate: 0.1", "learning_rate: 0.2"))
    with pytest.raises(
        UserError, match=r"learning_rate is 0.2 in .*config.yaml, the run was started with 0.1"
    ):
        resume(tmp_path / "run")
    config.write_text(text.replace("keep_checkpoints: 2", "keep_checkpoints: 5"))
    resume(tmp_path / "run")  # keeping more files changes nothing


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        resume(tmp_path)
    run(tmp_path / "run", {**DENSE, "epochs": 1})
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(f"format {FORMAT_VERSION}", "format 7", 1))
    with pytest.raises(UserError, match="has format 7"):
        resume(tmp_path / "run")
