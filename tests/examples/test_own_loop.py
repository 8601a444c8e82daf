"""The example of the two lines does what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from clicktrain.latency.machine import cpu_name


def test_own_loop(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(repository / "examples" / "own_loop.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"accuracy ([\d.]+)%  compression ([\d.]+)x", last)
    assert found is not None, last
    assert float(found[1]) > 94
    assert float(found[2]) == pytest.approx(8, rel=0.01)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast"])
def test_own_loop_timed_at_a_tiny_size(
    precision: str, repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(repository / "examples" / "own_loop_timed.py")
    tiny = ["--model", "resnet8", "--width", "0.25", "--image", "8", "--batch", "8", "--batches", "4"]
    bf16 = ["--bf16"] if precision != "fp32" else []
    monkeypatch.setattr("sys.argv", [script, *tiny, "--compression", "4", *bf16])
    runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().out
    assert said.startswith(f"{cpu_name()}, 1 thread(s), torch ")
    assert f"8 images of 8x8, {precision}, channels_last" in said
    compression = re.search(r"compression ([\d.]+)x", said)
    assert compression is not None
    assert float(compression[1]) == pytest.approx(4, rel=0.05)
    assert re.search(r"^pruned network, stage dense +\d+ +[\d.]+ ", said, re.MULTILINE)
    assert re.search(r"^after the hard prune +\d+ +[\d.]+ ", said, re.MULTILINE)
    assert re.search(r"are [\d.]+x as fast as the dense ones beside them$", said, re.MULTILINE)
