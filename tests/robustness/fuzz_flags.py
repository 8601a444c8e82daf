"""Command lines: every flag with values that fit and do not, missing and misplaced words."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

from cases import TINY, Case, Expected
from wrong_values import NEVER_A_NUMBER, TEXTS

from clicktrain.cli import COMMANDS
from clicktrain.commands.arguments import Option, options_of
from clicktrain.methods import METHODS
from clicktrain.train import RunConfig

# torch.compile takes a minute, and threads are those of the process that runs the fuzz; the rest of a run's
# settings must hold for any value.
LEFT_OUT = ("compile", "threads", "tensorboard", "log", "memory_budget", "method")
ODD_LINES: tuple[tuple[str, ...], ...] = (
    ("",), ("-",), ("--",), ("---",), ("-x",), ("--out",), ("\U0001f642",), ("a" * 5000,), ("train", "train"),
    ("train", "--"), ("train", "-o"), ("train", "--=3"), ("train", "--epochs="), ("train", "--epochs"),
    ("train", "--no-epochs"), ("train", "--no-report=3"), ("train", "--epochs", "--seed"), ("train", "-1"),
    ("train", "--config"), ("train", "--config", ""), ("train", "--config", "."), ("train", "--config",
    "/dev/zero"),
    ("train", "--config", "a" * 5000), ("resume", ""), ("resume", "."), ("resume", "/"), ("resume",
    "a" * 5000),
    ("resume", "/dev/null"), ("inspect",), ("inspect", "a", "b"), ("inspect", "."), ("inspect", "/dev/zero"),
    ("evaluate", ".", "--epsilon"), ("evaluate", ".", "--attack", "x"), ("export", "."), ("report",),
    ("report", "."), ("report", "/dev/null", "-o", "."), ("bench",), ("bench", "x"), ("bench", "conv",
    "--shapes", "x"),
    ("bench", "conv", "--shapes", "1,2,3,4,5,6"), ("bench", "conv", "--rounds", "0"), ("bench", "runs"),
    ("bench", "runs", "--runs", "."), ("bench", "step", "--model", "x"), ("bench", "conv", "--json", "."),
    ("bench", "conv", "--threads", "0"), ("bench", "conv", "--compression", "0"), ("bench", "pack",
    "--rounds", "x"),
)  # fmt: skip


def cases(rng: random.Random, count: int) -> list[Case]:
    """``count`` command lines."""
    made = [_line(words) for words in ODD_LINES][: count // 4]
    made += [_paths(rng) for _ in range(count // 12)]
    while len(made) < count:
        made.append(_one_flag(rng) if rng.random() < 0.75 else _several_flags(rng))
    return made


def _line(words: tuple[str, ...]) -> Case:
    line = list(words)
    shown = " ".join(word[:30] for word in words)
    return Case("flags", f"clicktrain {shown}", lambda place: line, "refused")


@functools.cache
def options(method: str) -> list[Option]:
    """The flags of a method that are tried."""
    return [o for o in (*options_of(RunConfig), *options_of(METHODS[method])) if o.name not in LEFT_OUT]


def _train(method: str, flags: list[str], what: str, expected: Expected = "either") -> Case:
    line = ["train", *TINY, "--method", method, "--epochs", "6", "--out", "run", *flags, "--dry-run"]
    return Case("flags", what, lambda place: line, expected)


def _one_flag(rng: random.Random) -> Case:
    method = rng.choice(sorted(METHODS))
    option = rng.choice(options(method))
    text = rng.choice(TEXTS)
    number = option.hint in (int, float, int | None, float | None)
    expected: Expected = "refused" if number and text in NEVER_A_NUMBER else "either"
    return _train(method, [f"{option.flag}={text}"], f"{method} {option.flag}={text[:40]!r}", expected)


def _several_flags(rng: random.Random) -> Case:
    method = rng.choice(sorted(METHODS))
    flags: list[str] = []
    for option in rng.sample(options(method), rng.randint(2, 5)):
        flags.append(option.flag)
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            flags.append(rng.choice(TEXTS) if rng.random() < 0.5 else _fitting(option, rng))
    return _train(method, flags, f"{method} {' '.join(flag[:20] for flag in flags)}")


def _fitting(option: Option, rng: random.Random) -> str:
    default: Any = option.default
    if isinstance(default, bool) or default is None:
        return rng.choice(("true", "false", "2", "0.5"))
    return str(default)


PLACES = (
    ("--out", "file"), ("--out", "full"), ("--out", "file/below"), ("--out", "loop"),
    ("--out", "a" * 300), ("--out", "a/" * 3000), ("--initial-weights", "loop"), ("--cache-dir", "file"),
    ("--initial-weights", "file"), ("--initial-weights", "full"), ("--initial-weights", "a" * 5000),
    ("--config", "loop"), ("--config", "file"), ("--config", "full"), ("--data", "imagefolder:loop"),
    ("--data", "imagefolder:" + "a" * 5000), ("--data", "parquet:file"), ("--data", "cifar10:loop"),
    ("--data", "a" * 5000), ("--model", "a" * 5000), ("--model", "a:" + "b" * 5000), ("--model", ":"),
    ("--width", "1000"), ("--width", "1e300"), ("--image-size", "16384"), ("--batch-size", "9999999"),
    ("--data", "synthetic:size=100000"), ("--data", "synthetic:classes=1000000000,train=1000000000"),
    ("--data", "synthetic:train=" + "9" * 5000), ("--image-size", "100000"), ("--workers", "1000000"),
)  # fmt: skip


def _paths(rng: random.Random) -> Case:
    """A run whose folder cannot be made, or a file or a size that cannot be."""
    kind, target = rng.choice(PLACES)

    def act(place: Path) -> list[str]:
        (place / "file").write_text("x")
        (place / "full").mkdir()
        (place / "full" / "x").touch()
        (place / "loop").symlink_to("loop")
        out = [] if kind == "--out" else ["--out", "run"]
        return ["train", *TINY, "--method", "dense", "--epochs", "1", "--no-report", *out, kind, target]

    fits = kind == "--batch-size" or (kind, target) == ("--cache-dir", "file")
    return Case("flags", f"{kind} {target[:60]}", act, "either" if fits else "refused")


assert set(COMMANDS) >= {"train", "resume", "evaluate", "inspect", "export", "report", "bench"}
