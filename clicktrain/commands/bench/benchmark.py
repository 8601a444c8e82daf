"""What a benchmark is to the command line: flags, a measurement, and a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clicktrain.commands.arguments import Option

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]
"""As it is written to a file."""


SPARSITY = (
    Option("compression", tuple[float, ...], "All weights over kept ones.", (4.0, 10.0), metavar="X [X ...]"),
    Option(
        "group", tuple[int, ...], "Neighboring filters that share their positions.", (1,), metavar="N [N ...]"
    ),
)
"""What is kept of the layers that are timed, for benchmarks of more than one sparsity."""
ROUNDS = Option("rounds", int, "Timings of which the median is taken.", 7, metavar="N")
PRECISION = Option(
    "precision",
    tuple[str, ...],
    "Of the accelerated steps; bf16 runs under autocast and may keep activations in it.",
    ("fp32",),
    metavar="fp32|bf16 [...]",
)
NETWORK = (
    Option("model", str, "Network of the zoo.", "resnet18"),
    Option("batch_size", int, "Images per step.", 64, metavar="N"),
    Option("image_size", int, "Side of the images in pixels.", 32, metavar="N"),
)
"""The network and images of a training step that is timed."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One thing that can be measured.

    Attributes:
        description: for ``--help``.
        options: its own flags.
        measure: (values of all flags, facts about the machine, a callback for progress) -> what stands beside
            "machine" and "settings" in the result. It may add facts about the machine.
        show: print the result for people.
    """

    description: str
    options: Sequence[Option]
    measure: Callable[[Result, Result, Callable[[str], None]], Result]
    show: Callable[[Result, Console], None]


Column = tuple[str, Callable[[Any], str]]
"""A heading, and the cell of a row of a result."""


def print_rows(
    console: Console, title: str, columns: Sequence[Column], rows: Sequence[Any], left: int = 1
) -> None:
    """Print a table with a line for each row of a result."""
    cells = [[cell(row) for _, cell in columns] for row in rows]
    print_table(console, title, [head for head, _ in columns], cells, left)


def print_table(
    console: Console,
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int = 1,
    *,
    whole_words: bool = False,
) -> None:
    """Print cells; the first ``left`` columns are words, the others numbers.

    ``whole_words``: in a narrow window long words go on in the next line instead of being cut.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for number, head in enumerate(heads):
        justify: Literal["left", "right"] = "left" if number < left else "right"
        table.add_column(head, justify=justify, overflow="fold" if whole_words else "ellipsis")
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def times(ratio: float | None) -> str:
    """A ratio as it is printed."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def ms(value: float | None, name: str | None = None) -> str:
    """A time as it is printed, with the name of what took it."""
    if value is None:
        return "-"
    text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return f"{text} ({name})" if name else text


def percent(share: float | None) -> str:
    """A share as it is printed."""
    return "-" if share is None else f"{100 * share:.0f}%"
