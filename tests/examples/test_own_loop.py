"""The example of the two lines does what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest


def test_own_loop(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(repository / "examples" / "own_loop.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"accuracy ([\d.]+)%  compression ([\d.]+)x", last)
    assert found is not None, last
    assert float(found[1]) > 94
    assert float(found[2]) == pytest.approx(8, rel=0.01)
