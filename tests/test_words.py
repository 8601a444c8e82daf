"""Code, messages and docs use the terms of GLOSSARY.md, in American spelling."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".c", ".h", ".j2", ".md", ".yaml"}

# Not used: a pattern, and what to write instead.
AVOIDED = {
    r"\banew\b": "again, rebuilt, re-measured",
    r"\bnumber types?\b": "dtype",
    r"(first|second)-level cache": "L1, L2",
    r"\b[Gg]radients? of the (input|weight)\b": "dgrad, wgrad; gradient w.r.t. the input",
    r"\bforesee": "predict",
    r"\bweights? that (live|die|go)\b": "kept, pruned, nonzero weights",
    r"\b(living|dead) (weight|position|kernel|unit)s?\b": "kept, pruned, nonzero",
    r"\bpositions? (is|are|was|were|being) fixed\b|\bfix(es|ing)? (the )?positions\b": "masks are frozen",
    r"positions fixed|fixed positions": "masks frozen",
    r"\b[Tt]old\b|\btell(s|ing)?\b": "report, say, state, tell apart: distinguish",
    r'"""Of ': "a docstring begins with an imperative or a noun",
    r"\bso (many|much)\b": "`n`, this many",
    r"\b[Nn]on-zero\b": "nonzero",
    r"\b[Rr]emember(s|ed|ing)?\b": "keep, cache, state",
    r"(?i)\b\w*(colour|neighbour|behaviour|favour|honour|artefact|catalogue)\w*": "US spelling",
    r"(?i)\blabelled(?!by)|\bcancelled|\bcentre[ds]?\b|\bgrey\b": "US spelling",
    r"(?i)\b(un|re|pre|de)?(normal|final|optim|initial|regular|general|penal|organ|recogn|summar|minim|maxim|"
    r"factor|parametr|vector|serial|synchron|special|util|quant|sanit|memor|parallel|real|local|stabil|"
    r"emphas)is(e|ed|es|er|ers|ing|ation|ations)\b|\banaly[s]e[ds]?\b|\banalysing\b": "US spelling (-ize)",
}  # fmt: skip

NAMES = re.compile(r"finalised|\bremember(?=[:=,)])")
"""An event's, and a parameter's of `accelerate`."""


def places() -> list[Path]:
    roots = [REPOSITORY / "clicktrain", REPOSITORY / "docs", REPOSITORY / "recipes", REPOSITORY / "examples"]
    files = [path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES]
    return [*files, *REPOSITORY.glob("*.md")]


@pytest.mark.parametrize("pattern", AVOIDED)
def test_words_of_the_glossary(pattern: str) -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:90]}"
        for path in places()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, NAMES.sub("", line))
    ]
    assert found == [], f"write {AVOIDED[pattern]!r} instead"
