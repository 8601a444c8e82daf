"""One version everywhere, and a changelog in the form that it claims."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import clicktrain

KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
"""Of Keep a Changelog 1.1.0, in its order."""


def test_the_citation_is_of_this_version(repository: Path) -> None:
    assert yaml.safe_load((repository / "CITATION.cff").read_text())["version"] == clicktrain.__version__


def test_the_changelog_has_its_form(repository: Path) -> None:
    text = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", one) for one in versions[1:])
    for part in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", part, re.MULTILINE)
        assert kinds == [kind for kind in KINDS if kind in kinds]
        entries = re.split(r"^### .*$", part, flags=re.MULTILINE)[1:]
        assert all(re.match(r"\n- \S", one) for one in entries)
        loose = [
            line for one in entries for line in one.splitlines() if line and not re.match(r"- |  \S", line)
        ]
        assert loose == []
