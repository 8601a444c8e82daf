"""Names and files of a run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from clicktrain.errors import UserError
from clicktrain.formats.atomic import append_jsonl
from clicktrain.runs.format import FORMAT_VERSION, HEADER
from clicktrain.train import RunFolder, config_to_dict, from_dict, load_run_config

SETTINGS = {"method": "dense", "model": "mine.nets:Small", "epochs": 3}


def make(path: Path) -> RunFolder:
    return RunFolder(path).create(config_to_dict(*from_dict(SETTINGS)))


def test_settings_are_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "a" / "run")
    assert load_run_config(folder, "mine.nets:Small") == from_dict(SETTINGS)
    assert folder.config.read_text().startswith(f"{HEADER}{FORMAT_VERSION}\nmodel: mine.nets:Small\n")
    assert folder.summary() is None
    assert folder.read_metrics() == folder.read_events() == []


def test_lines_can_be_taken_back_and_an_unfinished_one_does_not_count(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    append_jsonl(folder.metrics, {"epoch": 1})
    append_jsonl(folder.events, {"event": "stage"})
    marks = folder.log_marks()
    append_jsonl(folder.metrics, {"epoch": 2})
    with folder.events.open("a") as file:
        file.write('{"event": "po')  # killed while writing
    assert [line["epoch"] for line in folder.read_metrics()] == [1, 2]
    assert folder.read_events() == [{"event": "stage"}]
    assert folder.take_back(marks, 1.0) == []
    assert folder.log_marks() == marks
    append_jsonl(folder.metrics, {"epoch": 2.5})
    assert [line["epoch"] for line in folder.read_metrics()] == [1, 2.5]


def test_a_damaged_line_or_summary_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    folder.metrics.write_text("{]\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged"):
        folder.read_metrics()
    folder.summary_path.write_text("{")
    with pytest.raises(UserError, match=r"summary.json is damaged"):
        folder.summary()
    folder.write_summary({"format_version": 99})
    with pytest.raises(UserError, match=r"has format 99, .*: update clicktrain"):
        folder.summary()


def test_default_names_do_not_collide(tmp_path: Path) -> None:
    config, method = from_dict(SETTINGS)
    first = RunFolder.default(config.model, config.method, tmp_path)
    assert first.path.parent == tmp_path
    assert first.path.name.endswith("_Small_dense")
    assert not first.path.exists()
    first.create(config_to_dict(config, method))
    assert RunFolder.default(config.model, config.method, tmp_path).path != first.path


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file: give a folder"):
        make(tmp_path / "run")
    with pytest.raises(UserError, match="cannot make the folder"):
        make(tmp_path / "run" / "inside")
