from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from run_folders import make_run

from clicktrain.commands import report as command
from clicktrain.errors import UserError
from clicktrain.report import Report, watch_report, write_report

REFRESH = re.compile(r'<meta http-equiv="refresh" content="(\d+)">')


def test_the_page_follows_the_run_until_it_is_finished(tmp_path: Path) -> None:
    whole, run = make_run(tmp_path / "whole", epochs=6), tmp_path / "run"
    make_run(run, epochs=6, stop_after=2)
    page, pages, said = tmp_path / "out" / "page.html", [], []
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)

    def go_on(seconds: float) -> None:
        """What training does while the command sleeps."""
        pages.append(page.read_text())
        if len(pages) < 3:
            (run / "metrics.jsonl").write_text("".join(lines[: 2 + len(pages)]))
        else:
            shutil.copytree(whole, run, dirs_exist_ok=True)

    written = watch_report([run], page, said.append, seconds=0, wait=go_on)
    assert written == page
    assert [REFRESH.findall(text) for text in pages] == [["0"]] * 3
    rows = [text.count('class="r">11.50</td>') for text in pages]
    assert rows == sorted(rows)
    assert len(set(pages)) == 3
    final = page.read_text()
    assert not REFRESH.search(final)
    assert "unfinished" not in final
    assert final == write_report([run], tmp_path / "again.html").read_text()
    assert "kept up to date every 0 s" in said[0]
    assert said[1:] == [f"nothing trains in {run} now: 'clicktrain resume {run}' continues it"]


def test_pages_are_not_written_more_often_than_asked(tmp_path: Path) -> None:
    run, page = make_run(tmp_path / "run", epochs=6, stop_after=2), tmp_path / "page.html"
    pages = []

    def stop_at_three(seconds: float) -> None:
        pages.append(page.stat().st_mtime_ns)
        with (run / "events.jsonl").open("a") as file:
            file.write("\n")
        if len(pages) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_report([run], page, lambda text: None, seconds=3600, wait=stop_at_three)
    assert len(set(pages)) == 1


def test_watching_a_finished_run_ends_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", epochs=6)
    assert command.run([str(run), "--watch"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{run / 'report.html'}\n", "")
    assert not REFRESH.search((run / "report.html").read_text())


def test_a_folder_that_disappears_ends_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=6, stop_after=2)
    with pytest.raises(UserError, match="is gone"):
        watch_report([run], tmp_path / "p.html", lambda text: None, wait=lambda seconds: shutil.rmtree(run))


def test_flags_of_watching() -> None:
    with pytest.raises(UserError, match="--every is of --watch: give that too"):
        command.run(["run", "--every", "3"])
    with pytest.raises(UserError, match="every is 0: 1 to 86400 seconds are possible"):
        command.run(["run", "--watch", "--every", "0"])


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / 'a"b&c', epochs=6)
    report = Report(run, height=300)
    shown = report._repr_html_()
    page = re.search(r'srcdoc="([^"]*)"', shown)
    assert page is not None
    assert html.unescape(page[1]) == report.save(tmp_path / "page.html").read_text()
    assert 'height="300"' in shown
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['compression_ratio']:.1f}" in repr(report)
    with pytest.raises(UserError, match="there is no folder"):
        Report(tmp_path / "nowhere")
