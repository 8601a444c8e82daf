"""Run the command line ``clicktrain``; print a mistake as one sentence.

Exit codes: 0 done; 2 a mistake of the user's, or a file or disk that cannot be used, in one line on stderr;
128 + its number for a signal that stopped a run (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP); 141 if nobody reads
the output (a run goes on instead); 1 with a traceback for anything unexpected.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from clicktrain.errors import FailedElsewhere, UserError, shortened

COMMANDS: dict[str, str] = {
    "demo": "train handwritten digits dense and pruned, compare, write a report (a minute)",
    "train": "train and prune a network in one run",
    "resume": "continue a run that was interrupted",
    "evaluate": "accuracy and loss of a finished run",
    "list": "runs with their figures, finished or not",
    "inspect": "per-layer table of a finished run",
    "sensitivity": "accuracy when each layer alone is pruned",
    "export": "write a finished run's network for other tools",
    "report": "one HTML file that shows and compares runs",
    "cost": "project a run's exchange of gradients onto many GPUs",
    "frontier": "train a grid, and draw accuracy against what it costs",
    "reproduce": "list the papers' items, or run one and put its figures beside the paper's",
    "bench": "time what the methods cost and give, side by side",
    "methods": "the pruning methods and their settings",
    "models": "the networks of the zoo, their sizes and costs",
    "schema": "a JSON schema of recipes, for editors",
    "completion": "completion of commands, flags and values for a shell",
}
"""Command -> what it does. Each is a module of ``clicktrain.commands`` with ``run(argv) -> exit code``."""

LONGEST_WORD, LONGEST_SENTENCE = 300, 1000
"""Characters of what is printed, whatever was given."""

_GRACE_S = 1.0
"""For the process that says what is wrong."""
_FULL_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, the process's by default; the exit code.

    Unexpected exceptions pass through, so that their traceback is seen.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Its warnings about every retry would bury the one line that says what is wrong.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        code = _dispatch(argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # a broken pipe is to be seen here, not when Python ends
        return code
    except FailedElsewhere:
        time.sleep(_GRACE_S)  # a launcher ends all processes as soon as it sees one that has failed
        return 2
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        from clicktrain.commands.screen import discard_stdout

        if isinstance(error, BrokenPipeError):
            discard_stdout()  # its reader is gone (`clicktrain ... | head`): Python must not complain at exit
            return 141
        if error.errno in _FULL_DISK:
            discard_stdout()  # if it was the full one
            return _fail(
                f"no space left to write {error.filename or 'the output'}: free some space and try again"
            )
        if isinstance(error, PermissionError):
            return _fail(f"{error.filename}: permission denied, use a place where you may read and write")
        if error.filename is not None:
            reason = error.strerror or type(error).__name__
            return _fail(f"{error.filename} cannot be used: {reason[:1].lower()}{reason[1:]}")
        raise


def script() -> NoReturn:
    """Run the command line as a process of its own, which ends with the exit code."""
    code = main()
    joined = sys.modules.get("clicktrain.comm.processes")
    if joined is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        joined.end(code)
    sys.exit(code)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from clicktrain import __version__

        print(f"clicktrain {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command '{shortened(name, 80)}': {hint}")
    from clicktrain.commands.arguments import HelpPrinted

    try:
        code: int = importlib.import_module(f"clicktrain.commands.{name}").run(rest)
    except HelpPrinted:
        return 0
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "usage: clicktrain COMMAND [...]\n\nTrain and prune convolutional networks in one run.\n\n"
        f"{lines}\n\n'clicktrain COMMAND --help' shows the flags of a command.\n"
        "First steps: clicktrain demo, then\n"
        "  clicktrain train --data digits --compression 8 --epochs 12 --out runs/first"
    )


def _fail(sentence: str, code: int = 2) -> int:
    """Print a sentence, whatever it was broken into, as one line of bounded length and printable text."""
    words = (shortened(word, LONGEST_WORD) for word in sentence.split())
    line = shortened(" ".join(words), LONGEST_SENTENCE).encode("utf-8", "backslashreplace").decode("utf-8")
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    who = "clicktrain" if rank == "0" else f"clicktrain: process {rank}"
    with contextlib.suppress(OSError, ValueError):  # stderr is closed too: the exit code says it
        print(f"{who}: error: {printable}", file=sys.stderr, flush=True)
    return code
