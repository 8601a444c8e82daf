"""The fuzz: ``python tests/robustness/fuzz.py [--seed N] [--only CATEGORY] [--count N]``, or ``make fuzz``.

Prints right and wrong by category, and every case that is wrong. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fuzz_data
import fuzz_factories
import fuzz_flags
import fuzz_loops
import fuzz_runs
import fuzz_yaml
from cases import Case, Verdict, judge

CATEGORIES = {
    "flags": (fuzz_flags.cases, 420), "yaml": (fuzz_yaml.cases, 350), "run folders": (fuzz_runs.cases, 330),
    "data": (fuzz_data.cases, 260), "factories": (fuzz_factories.cases, 80), "own loops": (fuzz_loops.cases,
    100),
}  # fmt: skip
"""Category -> (what makes its cases, how many)."""
MEMORY = 24 * 2**30
"""Bytes of address space: a size that is taken on trust fails here, not the machine."""


def all_cases(seed: int, only: str | None = None, count: int | None = None) -> list[Case]:
    """The cases of a seed."""
    found = []
    for name, (make, number) in CATEGORIES.items():
        if only in (None, name):
            found += make(random.Random(f"{seed} {name}"), count or number)
    return found


def verdicts(cases: list[Case]) -> Iterator[Verdict]:
    """Try the cases, one after the other."""
    try:
        for case in cases:
            yield judge(case)
    finally:
        fuzz_runs.forget_runs()


def table(found: list[Verdict]) -> str:
    """Cases, refused and complete ones, right and wrong, by category."""
    rows = [("category", "cases", "refused", "complete", "right", "wrong")]
    for name in (*CATEGORIES, "all"):
        own = [v for v in found if name in (v.case.category, "all")]
        counts = Counter(refused=sum(v.refused and v.right for v in own), right=sum(v.right for v in own))
        right, refused = counts["right"], counts["refused"]
        if own:
            rows.append((name, *map(str, (len(own), refused, right - refused, right, len(own) - right))))
    return "\n".join(f"{row[0]:<12}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows)


def main() -> int:
    """Run the fuzz; 0 if all is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CATEGORIES)
    parser.add_argument("--count", type=int)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    limit_memory()
    found, started = [], time.monotonic()
    for verdict in verdicts(all_cases(given.seed, given.only, given.count)):
        found.append(verdict)
        if not verdict.right or given.verbose:
            at = f"{time.monotonic() - started:7.1f} s"
            print(f"{at} {verdict.case.category}: {verdict.case.what}: {verdict.why or 'right'}", flush=True)
    print(f"\nseed {given.seed}\n{table(found)}")
    return 0 if all(verdict.right for verdict in found) else 1


def limit_memory() -> None:
    """Let an allocation without bound fail in this process."""
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    sys.exit(main())
