from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clicktrain.commands import progress
from clicktrain.commands.progress import (
    EpochLines,
    LiveDisplay,
    epoch_line,
    log_lines,
    make_progress,
    pace,
    picture,
    result_line,
)
from clicktrain.train import StepProgress
from clicktrain.wording import clock, short

INFO = StepProgress(
    epoch=3, epochs=12, batch=40, batches=100, step=240, stage="pool", loss=1.23456, accuracy=54.32,
    density=0.25, learning_rate=0.0123, seconds=61.0, eta_seconds=3725.4, data_share=0.071,
    images_per_second=1234.5, epoch_eta_seconds=7.0,
)  # fmt: skip
RECORD: dict[str, Any] = {
    "epoch": 3, "stage": "pool", "stages": {"dense": 0.4, "pool": 0.6}, "train_loss": 1.23456,
    "train_accuracy": 54.32, "val_loss": 1.1, "val_accuracy": 60.0, "density": 0.25, "sparsity": 0.75,
    "seconds": 20.0, "data_seconds": 1.0,
}  # fmt: skip


def console(*, terminal: bool, width: int = 120) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=width, color_system=None), text


def test_the_picture_shows_where_a_run_is() -> None:
    screen, text = console(terminal=True)
    screen.print(picture(INFO))
    run, epoch, numbers = text.getvalue().rstrip().splitlines()
    assert run.startswith("epoch 3/12 ")
    assert run.rstrip().endswith("20% ETA 1:02:05")
    assert epoch.startswith("step 40/100 ")
    assert epoch.rstrip().endswith("1,234 images/s ETA 0:00:07")
    colourful = Console(file=io.StringIO(), force_terminal=True, width=120, color_system="standard")
    segments = [list(line) for line in colourful.render_lines(picture(INFO))]
    for line, share in zip(segments, (240 / 1200, 40 / 100), strict=False):
        pieces = [piece.text for piece in line if set(piece.text) & set("━╸╺")]
        assert abs(len(pieces[0]) / len("".join(pieces)) - share) < 0.05
    assert "stage pool  loss 1.2346  accuracy 54.3%  sparsity 75.0%" in numbers
    assert numbers.rstrip().endswith("waiting for data 7%")


def test_the_live_display_draws_and_leaves_only_the_epoch_lines() -> None:
    screen, text = console(terminal=True)
    display = LiveDisplay(screen)
    display._live.start()
    display.step(INFO)
    assert "epoch 3/12" in text.getvalue()
    assert "step 40/100" in text.getvalue()
    drawn = len(text.getvalue())
    display.step(replace(INFO, batch=41))
    assert len(text.getvalue()) == drawn  # too soon after the last picture
    display.step(replace(INFO, batch=100, eta_seconds=60.0))
    assert "step 100/100" in text.getvalue()[drawn:]
    display.epoch(RECORD)
    display.finish({})
    display.close()
    assert "epoch  3/12  loss 1.2346" in text.getvalue()
    assert text.getvalue().rstrip().endswith("\x1b[2K")  # the picture is wiped


def test_epoch_lines_are_plain() -> None:
    screen, text = console(terminal=False, width=20)
    lines = EpochLines(screen)
    lines.step(replace(INFO, batch=100, eta_seconds=60.0))
    lines.epoch(RECORD)
    lines.message("no [brackets] are lost")
    line, message = text.getvalue().splitlines()
    assert line == (
        "epoch  3/12  loss 1.2346  train  54.3%  val  60.0%  sparsity 75.0%  20.0 s  "
        "waiting for data 5%  ETA 0:01:00  dense+pool"
    )
    assert message == "no [brackets] are lost"


def test_a_long_epoch_has_lines_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, text = console(terminal=False, width=20)
    lines = EpochLines(screen)
    lines.step(INFO)  # too soon
    assert text.getvalue() == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    lines.step(INFO)
    lines.step(replace(INFO, batch=100))  # its epoch's line follows
    assert text.getvalue() == (
        "epoch   3/12  step 40/100  loss 1.2346  train  54.3%  1,234 images/s  "
        "ETA 0:00:07 of the epoch, 1:02:05 of the run  pool\n"
    )


def test_the_pace_of_an_epoch_and_of_slow_steps() -> None:
    assert "  320 images/s  " in epoch_line({**RECORD, "batch_size": 64, "step_ms_median": 200.0})
    assert pace(replace(INFO, images_per_second=3.14159)) == "3.14 images/s"


def test_an_epoch_that_was_not_evaluated() -> None:
    line = epoch_line({**RECORD, "val_accuracy": None, "seconds": 0.0, "stages": {}})
    assert "val     -" in line
    assert line.startswith("epoch 3  loss")
    assert line.endswith("waiting for data 0%  pool")


def test_which_display() -> None:
    assert isinstance(make_progress(console(terminal=True)[0], quiet=False), LiveDisplay)
    assert type(make_progress(console(terminal=False)[0], quiet=False)) is EpochLines
    assert make_progress(console(terminal=True)[0], quiet=True) is None


def test_what_is_logged_is_shown_inside_the_block_only() -> None:
    screen, text = console(terminal=False, width=20)
    logger = logging.getLogger("clicktrain.data.opening")
    with log_lines(screen):
        logger.info("decoding the images of %s, once", "parquet:[x]")
        logger.debug("no")
    logger.warning("after")
    assert text.getvalue() == "decoding the images of parquet:[x], once\n"


def test_result_line(tmp_path: Path) -> None:
    summary: dict[str, Any] = {
        "compression_asked": 8.0, "compression_ratio": 8.014, "val_accuracy": 91.234,
        "best_val_accuracy": 92.0, "train_flops_ratio": 0.61, "inference_flops_ratio": 0.153,
        "train_seconds": 3661.0,
    }  # fmt: skip
    assert result_line(summary, tmp_path) == (
        "compression asked 8x, reached 8.01x; accuracy 91.23% (best 92.00%); training FLOPs 61% of dense; "
        f"inference FLOPs 15% of dense; time 1:01:01; files in {tmp_path}"
    )
    for nominal, shown in ((0.402, " (40% nominal)"), (0.612, ""), (None, "")):
        line = result_line({**summary, "train_flops_ratio_nominal": nominal}, tmp_path)
        assert f"training FLOPs 61% of dense{shown}; inf" in line
    summary |= {"initial_train_flops": 10, "total_train_flops_ratio": 1.61}
    assert "training FLOPs 61% of dense, 161% with its initial weights; inf" in result_line(summary, tmp_path)
    summary |= {"initial_train_seconds": 39.0, "total_train_seconds": 3700.0}
    assert "; time 1:01:01, 1:01:40 with its initial weights; files" in result_line(summary, tmp_path)
    summary |= {"initial_train_seconds": None, "total_train_seconds": None}
    summary |= {"initial_train_flops": None, "total_train_flops_ratio": None}  # of a file
    assert "61% of dense, its initial weights not counted; inf" in result_line(summary, tmp_path)
    summary["compression_asked"] = summary["val_accuracy"] = None
    assert result_line(summary, tmp_path).startswith("no compression asked, reached 8.01x; training FLOPs")


def test_numbers() -> None:
    seconds = {None: "-:--:--", 0: "0:00:00", 59.6: "0:01:00", 3600: "1:00:00", 360000: "100:00:00"}
    assert {number: clock(number) for number in seconds} == seconds
    assert [short(n) for n in (0, 999, 1234, 1_234_567, 4.1e9)] == ["0", "999", "1.23k", "1.23M", "4.1G"]
    assert short(4.1e9, " ") == "4.1 G"
