"""What mkdocs needs to make a site of pages that are written for reading in the repository.

Pages at the root of the repository get a place in the site, links between pages follow, and what GitHub's
Markdown reads without a blank line is given one. ``mkdocs.yml`` names this file under ``hooks``.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ROOT_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "GLOSSARY.md": "glossary.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages outside of docs/ and what they are called in the site."""

SETTINGS = "reference/methods.md"
"""The page that shows of each class its settings alone."""

_FENCE = re.compile(r"^\s*(```|~~~)")
_LINK = re.compile(r"(!?\[(?P<text>(?:[^\]\\]|\\.)*)\])\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_ITEM = re.compile(r"^(?P<indent> *)([-*]|\d+\.) ")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages at the root."""
    from mkdocs.structure.files import File

    for name, place in ROOT_PAGES.items():
        files.append(File.generated(config, place, content=(REPOSITORY / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite a page before it is rendered."""
    text = for_site(markdown, page.file.src_uri)
    return only_settings(text) if page.file.src_uri == SETTINGS else text


def only_settings(markdown: str) -> str:
    """The page with what mkdocstrings is to leave out: all members of methods that are no fields."""
    hidden = "|".join(sorted(_no_fields()))
    options = f"\n    options:\n      filters: ['!^_', '!^({hidden})$']"
    return re.sub(r"^::: .*$", lambda match: match[0] + options, markdown, flags=re.MULTILINE)


def _no_fields() -> set[str]:
    """Names in classes of ``clicktrain.methods`` that are functions or class variables."""
    names: set[str] = set()
    fields: set[str] = set()
    for path in (REPOSITORY / "clicktrain" / "methods").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for item in ast.walk(tree) if isinstance(item, ast.ClassDef) for node in item.body):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                is_variable = ast.unparse(node.annotation).startswith("ClassVar")
                (names if is_variable else fields).add(node.target.id)
    return {name for name in names - fields if not name.startswith("_")}


def for_site(markdown: str, place: str) -> str:
    """The text of the page at this place of the site, as mkdocs wants it."""
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            line = _LINK.sub(lambda match: _link(match, place), line)
            if needs_blank(lines[-1] if lines else "", line):
                lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def needs_blank(before: str, line: str) -> bool:
    """Whether a list or table begins here right below a line of text or a comment."""
    text = before.strip()
    if not text:
        return False
    if line.startswith("|"):
        return not text.startswith("|")
    item = _ITEM.match(line)
    inside = _ITEM.match(before) is not None or before.startswith(" ")
    return item is not None and not item["indent"] and not inside and not text.startswith(("#", "|"))


def _link(match: re.Match[str], place: str) -> str:
    target = match["target"]
    if "://" in target or target.startswith("mailto:"):
        return match[0]
    outside = {page: name for name, page in ROOT_PAGES.items()}
    source = outside.get(place, f"docs/{place}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path in ROOT_PAGES:
        found = ROOT_PAGES[path]
    elif path.startswith("docs/"):
        found = path.removeprefix("docs/")
    elif (REPOSITORY / path).exists():
        return f"{match['text']} (`{path}`)"  # a file of the repository that is no page
    else:
        return match[0]  # mkdocs says that it is not there
    link = posixpath.relpath(found, posixpath.dirname(place) or ".")
    return f"{match[1]}({link}{match['anchor'] or ''})"
