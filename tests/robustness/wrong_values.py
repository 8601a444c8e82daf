"""Values that no setting expects, as a person or another program might write them."""

from __future__ import annotations

import random
from typing import Any

TEXTS = (
    "x", "1.5", "-1", "0", "1e3", "1:30:00", "2020-01-01", "nan", "inf", "-inf", "9" * 5000,
    "100000000000000000000", "9223372036854775808", "-9223372036854775809", "null", "~", "true", "no", "[1]",
    "[[1], [2]]", "{a: 1}", "", " ", "\u0661", "\U0001f642",
    "!!python/object/apply:os.system [touch code_was_run]",
    "&a [*a]", "1_000", "0x10", "010", "1.", ".5", "1e400", "-0", "a" * 5000, "\u202e", "\t", "'", '"',
    "%s", "{}",
    "../..", "/dev/null", "a=b", "a,b", "0.5", "2", "3", "1e-300", "1e300", "-0.5", "4", "auto", "none",
)  # fmt: skip
NEVER_A_NUMBER = (
    "x", "1:30:00", "2020-01-01", "[1]", "[[1], [2]]", "{a: 1}", "\U0001f642", "a" * 5000, "&a [*a]", "a=b",
    "!!python/object/apply:os.system [touch code_was_run]", "../..", "true",
)  # fmt: skip
JSON: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1.5, -0.5, 1e308, float("nan"), float("inf"),
    "",
    "x", "1", "a" * 5000, "\u202e", [], [1], [[]], [None], {}, {"a": 1}, {"x": [1, {"y": 2}]}, [0] * 50,
    "../../etc/passwd", "fuzzed_evil:build", [1, 2, 3, 4], ["a", "b"], [-1, 8, 8], [2**40, 2**40, 2**40],
)  # fmt: skip


def mutated(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A copy of a JSON value in which one thing is wrong: replaced, missing, doubled or added."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.7):
        copy, key = dict(value), rng.choice(sorted(value))
        choice = rng.random()
        if choice < 0.12:
            del copy[key]
        elif choice < 0.18:
            copy["an unknown key"] = rng.choice(JSON)
        else:
            copy[key] = mutated(value[key], rng, depth + 1)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.6:
        items, at = list(value), rng.randrange(len(value))
        choice = rng.random()
        if choice < 0.15:
            del items[at]
        elif choice < 0.3:
            items.append(items[at])
        else:
            items[at] = mutated(items[at], rng, depth + 1)
        return items
    return rng.choice(JSON)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file cut, changed in a few bytes, emptied, doubled or replaced."""
    choice = rng.randrange(6) if data else 5
    if choice == 0:
        return data[: rng.randrange(len(data) + 1)]
    if choice == 1:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if choice == 2:
        return b""
    if choice == 3:
        return data + data
    if choice == 4:
        at = rng.randrange(len(data))
        return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]
    return rng.randbytes(rng.randint(1, 4096))
