"""The script for fish."""

from __future__ import annotations

from collections.abc import Sequence

from clicktrain.cli import COMMANDS
from clicktrain.commands.bench import BENCHMARKS
from clicktrain.commands.shells.table import DEFAULT_METHOD, Flag, Place, Value

_HEAD = """\
# fish completion of clicktrain, for ~/.config/fish/completions/clicktrain.fish
# The place that the words of a line lead to: COMMAND, train/METHOD or bench/BENCHMARK.
function __clicktrain_place
    set -l words (commandline -opc)
    test (count $words) -gt 1; or return
    switch $words[2]
        case train
            set -l found @METHOD@
            set -l before ''
            for word in $words
                test "$before" = --method; and set found $word
                string match -q -- '--method=*' $word; and set found (string replace -- --method= '' $word)
                set before $word
            end
            echo train/$found
        case bench
            for word in $words
                if contains -- $word @BENCHMARKS@
                    echo bench/$word
                    return
                end
            end
            echo bench
        case '*'
            echo $words[2]
    end
end
function __clicktrain_at
    contains -- (__clicktrain_place) $argv
end
complete -c clicktrain -f
"""


def fish_script(places: Sequence[Place]) -> str:
    """The script for fish, which shows what flags are for."""
    head = _HEAD.replace("@METHOD@", DEFAULT_METHOD).replace("@BENCHMARKS@", " ".join(BENCHMARKS))
    lines = [
        f"complete -c clicktrain -n __fish_use_subcommand -a {name} -d {_quoted(what)}"
        for name, what in COMMANDS.items()
    ]
    where: dict[tuple[str, Flag | Value], list[str]] = {}
    """What is the same in several places of a command is said once."""
    for place in places:
        offers: list[Flag | Value] = [*place.flags]
        if place.argument is not None:
            offers.append(place.argument)
        for what in offers:
            where.setdefault((place.command, what), []).append(place.name)
    for (_, what), names in where.items():
        start = f"complete -c clicktrain -n '__clicktrain_at {' '.join(names)}'"
        lines += [f"{start} {rest}" for rest in _rests(what)]
    return head + "\n".join(lines) + "\n"


def _rests(what: Flag | Value) -> list[str]:
    """The ends of the lines for a flag or an argument."""
    if isinstance(what, Value):
        return [_completes(what, "f")]
    name, help_text = what.flag[2:], _quoted(what.help)
    if what.negated is not None:
        return [f"-l {name} -d {help_text}", f"-l {what.negated[2:]} -d {_quoted(f'not: {what.help}')}"]
    short = f" -s {what.short[1:]}" if what.short else ""
    return [f"-l {name}{short} {_completes(what.value, 'x')} -d {help_text}"]


def _completes(value: Value, alone: str) -> str:
    """What is offered; ``alone``: -f, no files beside it, or -x, the same and the value has to be there."""
    if value.kind == "file":
        return "-r -F"
    if value.kind == "folder":
        return f"-{alone} -a '(__fish_complete_directories)'"
    return f"-{alone} -a {_quoted(' '.join(value.words))}" if value.words else f"-{alone}"


def _quoted(text: str) -> str:
    """A word of fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
