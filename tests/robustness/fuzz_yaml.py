"""Recipes: wrong values, structures that no recipe has, text that is no YAML, files that are none."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import yaml
from cases import DATA, Case, Expected
from fuzz_flags import options
from wrong_values import NEVER_A_NUMBER, TEXTS, damaged

from clicktrain.methods import METHODS

_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
REFUSED = (
    _BOMB, _BOMB + "epochs: *a11\n", "epochs: &a [*a]\n", "seed: 1\nseed: 2\n", "epochs: 2\n'epochs': 3\n",
    "<<: {epochs: 3}\n", "? [1]\n: 2\n", "? {a: 1}\n: 2\n",
    "!!python/object/apply:os.system ['touch code_was_run']\n",
    "epochs: !!python/object/apply:os.system ['touch code_was_run']\n", "epochs: !!int x\n",
    "epochs: !!timestamp 2001-01-01\n",
    "a: !!binary aGk=\n", "epochs: 1:30:00\n", "epochs: 2020-01-01\n", "epochs: " + "1" * 5000 + "\n",
    "epochs: [" * 3000,
    "{" * 3000, "epochs: 3\n---\nepochs: 4\n", "- 1\n", "3\n", "text\n", "epochs: 3\n\tseed: 1\n", "\x00",
    "epochs: *b\n",
    "%YAML 9.9\n---\nepochs: 2\n", "&a : 1\n", "null: 1\n", "1: 2\n", "true: 3\n", "epochs: 010\n",
    "1.5: 2\n",
    "model: fuzzed_evil:build\n", "model: 'fuzzed_evil:build'\nmethod: dense\n", "model: [1]\n",
    "model: null\n",
    "method: null\n", "method: [1]\n", "method: 3\n", "x: " + "y" * 2_000_000, "epochs: |\n  3\n",
    "epochs: {}\n",
    "epoch: 3\n", "\ufeff\ufeffepochs: 3\n", "epochs: true\n", "epochs: 3.0\n", "seed: '1'\n",
    "a" * 5000 + ": 1\n",
)  # fmt: skip


def cases(rng: random.Random, count: int) -> list[Case]:
    """``count`` recipes."""
    made = [_text(text, "refused") for text in REFUSED][: count // 3]
    made += [_no_file(rng) for _ in range(count // 25)]
    while len(made) < count:
        made.append(_wrong_setting(rng) if rng.random() < 0.7 else _damaged_recipe(rng))
    return made


def _text(text: str | bytes, expected: Expected = "either", what: str = "") -> Case:
    def act(place: Path) -> list[str]:
        (place / "fuzzed_evil.py").write_text("open('code_was_run', 'w').close()\n")
        (place / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["train", "--config", "recipe.yaml", "--out", "run", "--dry-run"]

    return Case("yaml", what or repr(text[:60]), act, expected)


def _base(method: str) -> dict[str, Any]:
    base = {"model": "resnet8", "width": 0.1, "data": DATA, "method": method}
    return {**base, "batch_size": 8, "epochs": 6, "threads": 1}


def _wrong_setting(rng: random.Random) -> Case:
    method = rng.choice(sorted(METHODS))
    option = rng.choice(options(method))
    base = {key: value for key, value in _base(method).items() if key != option.name}
    value = rng.choice([text for text in TEXTS if text.strip() and "\n" not in text])
    number = option.hint in (int, float, int | None, float | None)
    expected: Expected = "refused" if number and value in NEVER_A_NUMBER else "either"
    text = f"{yaml.safe_dump(base)}{option.name}: {value}\n"
    return _text(text, expected, f"{method} {option.name}: {value[:40]}")


def _damaged_recipe(rng: random.Random) -> Case:
    text = yaml.safe_dump(_base(rng.choice(sorted(METHODS))))
    lines = text.splitlines()
    choice = rng.randrange(4)
    if choice == 0:
        return _text(damaged(text.encode(), rng), what="damaged bytes")
    if choice == 1:
        return _text("\n".join([*lines, rng.choice(lines)]) + "\n", "refused", "a line twice")
    if choice == 2:
        at = rng.randrange(len(lines))
        lines[at] = lines[at].replace(
            ": ", rng.choice((":", " ", ":: ", ": - ", ": ? ", ": {", ": *", ": !")), 1
        )
        return _text("\n".join(lines) + "\n", what=f"a broken line {lines[at]!r}")
    rng.shuffle(lines)
    lines[0] = " " * rng.randint(1, 4) + lines[0]
    return _text("\n".join(lines) + "\n", what="an indented line")


def _no_file(rng: random.Random) -> Case:
    def act(place: Path) -> list[str]:
        kind = rng.randrange(6)
        path = place / "recipe.yaml"
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            path.symlink_to("/dev/zero")
        elif kind == 2:
            path.mkdir()
        elif kind == 3:
            path.symlink_to("recipe.yaml")
        elif kind == 4:
            path.symlink_to("nowhere")
        else:
            with path.open("wb") as file:
                file.truncate(10**12)
        return ["train", "--config", "recipe.yaml", "--out", "run", "--dry-run"]

    return Case("yaml", "a config that is no regular file", act, "refused")
