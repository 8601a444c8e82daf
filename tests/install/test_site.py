"""The site of docs/: every page has its place, and everything public is in the reference.

`make site`, which CI runs, builds it with every warning an error: links and anchors that lead nowhere too.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import clicktrain
from clicktrain.methods import METHODS

REPOSITORY = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("site_pages", REPOSITORY / "scripts" / "site_pages.py")
assert SPEC is not None
assert SPEC.loader is not None
site = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(site)


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, in which a tag names a function."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def settings() -> dict[str, Any]:
    return yaml.load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)


def pages_in(nav: Any) -> Iterator[str]:
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from pages_in(value)
        else:
            yield value


def test_every_page_has_one_place() -> None:
    placed = list(pages_in(settings()["nav"]))
    there = {path.relative_to(REPOSITORY / "docs").as_posix() for path in (REPOSITORY / "docs").rglob("*.md")}
    assert sorted(placed) == sorted(there | set(site.ROOT_PAGES.values())), (
        "give it a line in mkdocs.yml, under nav"
    )


def test_everything_public_is_in_the_reference() -> None:
    text = "".join(path.read_text() for path in (REPOSITORY / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    assert {f"clicktrain.{name}" for name in clicktrain.__all__} <= named
    assert {f"clicktrain.methods.{method.__name__}" for method in METHODS.values()} <= named


def test_links_follow_to_where_pages_are_in_the_site() -> None:
    assert site.for_site("[a](../GLOSSARY.md#b)\n", "architecture.md") == "[a](glossary.md#b)\n"
    assert site.for_site("[a](../../GLOSSARY.md)\n", "results/cifar10.md") == "[a](../glossary.md)\n"
    assert site.for_site("[a](docs/deploy.md)\n", "changelog.md") == "[a](deploy.md)\n"
    assert site.for_site("[a](../recipes/digits.yaml)\n", "frontier.md") == "a (`recipes/digits.yaml`)\n"
    assert (
        site.for_site("[a](https://example.org/b.md)\n", "frontier.md") == "[a](https://example.org/b.md)\n"
    )
    fenced = "```\n[a](../GLOSSARY.md)\ntext\n- item\n```\n"
    assert site.for_site(fenced, "architecture.md") == fenced


@pytest.mark.parametrize(
    ("before", "line", "needed"),
    [
        ("text", "- item", True),
        ("text", "1. item", True),
        ("-->", "| a | b |", True),
        ("- item", "- item", False),
        ("  more of it", "- item", False),
        ("# heading", "- item", False),
        ("| a |", "| b |", False),
        ("", "- item", False),
        ("text", "-5 degrees", False),
    ],
)
def test_lists_and_tables_get_the_blank_line_that_they_need(before: str, line: str, needed: bool) -> None:
    assert site.needs_blank(before, line) == needed


def test_the_page_of_settings_leaves_out_what_is_none() -> None:
    text = site.only_settings("# Title\n\n::: clicktrain.methods.RigL\n")
    head, _, filters = text.partition("\n    options:\n      filters: ")
    assert head == "# Title\n\n::: clicktrain.methods.RigL"
    hidden = set(re.findall(r"\w+", filters))
    assert {"attach", "after_step", "name", "title"} <= hidden
    assert not hidden & {"sparsity", "interval", "drop_rule", "compression", "loss_slope"}


def test_cells_of_the_comparison_have_sources() -> None:
    text = (REPOSITORY / "docs" / "comparison.md").read_text(encoding="utf-8")
    table = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    defined = set(re.findall(r"^\[([\w-]+)\]: https://", text, re.MULTILINE))
    for question, ours, *others in table[1:]:
        assert len(others) == 5, question
        assert "`" in ours or "](" in ours or question.strip() == "quantization", question
        for cell in others:
            used = re.findall(r"\]\[([\w-]+)\]", cell)
            assert used, f"{question}: {cell}"
            assert set(used) <= defined
