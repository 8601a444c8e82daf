"""docs/tutorial.md, typed word by word into an environment that has nothing of the checkout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import blocks

OFFLINE = "export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_DISABLE_PIP_VERSION_CHECK=1\n"
"""Build with the setuptools that is there, instead of downloading it (0 stands for no isolation)."""


@pytest.mark.long
def test_every_command_works_as_it_stands(fresh, repository: Path, tmp_path: Path) -> None:
    kinds = blocks(repository / "docs" / "tutorial.md")
    assert {language for language, _ in kinds} == {"sh", "python"}
    (first, install), *rest = kinds
    assert (first, install) == ("sh", "python -m pip install .\n")
    fresh.run(OFFLINE + install, fresh.source)
    said = []
    for number, (language, text) in enumerate(rest):
        if language == "python":
            (tmp_path / f"block{number}.py").write_text(text)
            text = f"python -W error block{number}.py"
        said.append(fresh.run(text, tmp_path))
    assert fresh.run("python -c 'import clicktrain; print(clicktrain.__file__)'", tmp_path).startswith(
        str(fresh.folder)
    )
    everything = "".join(said)
    assert "dry run: nothing was written" in everything
    assert "compression asked 4x, reached " in everything
    assert re.search(r"\b(3\.9|4\.[01])\dx smaller", everything)
    accuracy = everything.rpartition("% of images that it has not seen")[0].split()[-1]
    assert float(accuracy) > 85
    for page in ("runs/demo/report.html", "compare.html"):
        assert (tmp_path / page).stat().st_size > 10_000
    assert (tmp_path / "runs" / "moving" / "export-c" / "model.h").is_file()
