"""The examples of docs/integrations.md do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = {
    "transformers_digits": ("transformers", r"accuracy ([\d.]+)%  compression ([\d.]+)x", 94, 4),
    "ultralytics_shapes": ("ultralytics", r"mAP50 ([\d.]+)  compression ([\d.]+)x", 0.3, 10 / 3),
}
"""Example -> package and extra, its last line, and what the two numbers in it have to be."""


@pytest.mark.long
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example(example: str, repository: Path, tmp_path: Path) -> None:
    package, pattern, least, compression = EXAMPLES[example]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'clicktrain[{package}]'")
    done = subprocess.run(
        [sys.executable, str(repository / "examples" / f"{example}.py")],
        capture_output=True, text=True, timeout=550, check=False, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository),
             "YOLO_CONFIG_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.match(pattern, done.stdout.splitlines()[-1])
    assert found is not None, done.stdout[-2000:]
    assert float(found[1]) > least
    assert float(found[2]) == pytest.approx(compression, rel=0.1)
