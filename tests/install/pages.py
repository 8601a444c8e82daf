"""Reading the documentation's pages."""

from __future__ import annotations

import re
from pathlib import Path


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page that say their language."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
