"""Files of somebody else's: regular, bounded, plain data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clicktrain.errors import UserError, shown
from clicktrain.files import MOST_NODES, is_file, parse_yaml, read_json, read_regular, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
        with pytest.raises(OSError, match="symbolic links"):
            read_regular(path, 10)
        with pytest.raises(UserError, match="cannot be read"):
            is_file(path)
        return
    with pytest.raises(UserError, match=f"x is a {kind}: a regular file is needed"):
        read_regular(path, 10)
    assert not is_file(path)


def test_sizes_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(UserError, match=r"has 5 bytes: .* up to 4 bytes"):
        read_regular(path, 4)
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match=r"1,000,000,000,000 bytes"):
        read_yaml(path)
    with pytest.raises(UserError, match="cannot be read"):
        is_file("a" * 5000)


@pytest.mark.parametrize("text", ["{", "[" * 10_000, "1" * 5000, "\xff"])
def test_json_is_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"x\.json is damaged: it is not (JSON|UTF-8 text)"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:30:00", "1:30:00"), ("2020-01-01", "2020-01-01"), ("010", "010"), ("0", 0), ("-12", -12),
        ("1_000", 1000),
        ("0x1f", 31), ("0b11", 3), ("1.5", 1.5), ("5e-4", 5e-4), ("1e3", 1000.0), (".5", 0.5), ("-.inf",
        -float("inf")),
        ("yes", True), ("off", False), ("~", None), ("", None), ("[1, [a]]", [1, ["a"]]), ("12:30", "12:30"),
        ("{a: {b: 1}}", {"a": {"b": 1}}), ("&x 3", 3), ("[&x 3, *x]", [3, 3]), ("1.2.3", "1.2.3"), ("none",
        "none"),
    ],
)  # fmt: skip
def test_plain_values(text: str, value: object) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, f"holds more than {MOST_NODES:,} values"),
        ("[" + ",".join("x" * 20_000) + "]", f"holds more than {MOST_NODES:,} values"),
        ("a: &a [*a]", "has a value that contains itself"),
        ("a: 1\nb: 2\na: 3", r"gives 'a' twice \(line 3\)"),
        ("a: {b: 1, b: 2}", "gives 'b' twice"),
        ("1: a\n0x1: b", "gives 1 twice"),
        ("[" * 100 + "]" * 100, "is nested deeper than 32 levels"),
        ("[" * 5000, "is nested deeper than 32 levels"),
        ("<<: {a: 1}", "has a value with the tag"),
        ("a: !!timestamp 2020-01-01", "has a value with the tag"),
        ("!!python/object/apply:os.system [x]", "has a value with the tag"),
        ("!!python/name:os.system", "has a value with the tag"),
        ("? [1]\n: 2", "has a key that is no name"),
        ("1" * 5000, "which is no number that can be read"),
        ("!!int x", "which is no number that can be read"),
        ("!!float x", "has a value that its tag does not allow"),
        ("a: [1", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_what_no_settings_file_has(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 200


def test_wrong_values_are_shown_short() -> None:
    nested: list[object] = ["x"]
    for _ in range(100):
        nested = [nested] * 100
    for value in (nested, "a" * 10**6, 10**6000, {"a": "b" * 1000}, [1] * 1000, b"x" * 1000):
        assert len(shown(value)) <= 200
    assert shown("three") == "'three'"
    assert shown([0.7, 0.2]) == "[0.7, 0.2]"
    assert shown(10**5000) == "a number of about 5,000 digits"
