"""Registered operators are annotated as PyTorch 2.6 reads them: it knows no aliases and no ``list``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "clicktrain"
KNOWN = {"Tensor", "Sequence", "tuple", "int", "float", "bool", "str", "None"}


def operators(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions that are given to ``torch.library.custom_op``, as a decorator or by name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func) == "torch.library.custom_op"]
    named = {word.id for call in calls for word in call.args if isinstance(word, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and (
            node.name in named or any(decorator in calls for decorator in node.decorator_list)
        ):
            yield node


def unknown_names(function: ast.FunctionDef) -> set[str]:
    notes = [argument.annotation for argument in (*function.args.args, *function.args.kwonlyargs)]
    used = {node.id for note in (*notes, function.returns) if note is not None
            for node in ast.walk(note) if isinstance(node, ast.Name)}  # fmt: skip
    return used - KNOWN


def test_annotations_are_those_that_the_oldest_version_knows() -> None:
    found = [
        (path.relative_to(PACKAGE).as_posix(), function)
        for path in PACKAGE.rglob("*.py")
        if "custom_op" in (text := path.read_text(encoding="utf-8"))
        for function in operators(ast.parse(text))
    ]
    assert len(found) > 15
    assert {f"{path}: {one.name}": unknown_names(one) for path, one in found if unknown_names(one)} == {}


@pytest.mark.parametrize("note", ["Four", "list[Tensor]"])
def test_another_is_found(note: str) -> None:
    (function,) = operators(
        ast.parse(f"def run(x: Tensor) -> {note}: ...\nop = torch.library.custom_op('a::b', run)")
    )
    assert unknown_names(function)
