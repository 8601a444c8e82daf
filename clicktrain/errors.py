"""Errors for mistakes of the user, and the warning of a missed target."""

from __future__ import annotations

import reprlib


class UserError(ValueError):
    """A mistake of the user: one sentence that says what is wrong and what would be right.

    The command line prints the sentence without a traceback and exits with code 2.

    Attributes:
        may_pass: whether the same may go well another time.
    """

    may_pass: bool = False


class FailedElsewhere(UserError):  # noqa: N818 - reads as a sentence to the user
    """What another process of the same training says already: this one stops without a word."""


class ProcessLost(UserError):  # noqa: N818 - reads as a sentence to the user
    """Another process of the same training has ended, or does not answer."""

    may_pass = True


class OutOfMemory(UserError):  # noqa: N818 - reads as a sentence to the user
    """The system, or a GPU, has no memory left."""

    may_pass = True


class NetworkCollapsed(UserError):  # noqa: N818 - reads as a sentence to the user
    """Pruning has destroyed the network; training it further is useless."""


class MissedTarget(UserWarning):
    """A run has missed its target by more than 5%; the warning says which, and why if known."""


def shown(value: object, longest: int = 60) -> str:
    """``repr`` of a value from outside, shortened in the middle.

    Work and length are bounded for any value: a list that holds itself a million times, a number of 5,000
    digits, a megabyte of text.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = longest
    short.maxlevel = 3
    short.maxlist = short.maxtuple = short.maxset = short.maxfrozenset = short.maxdict = 4
    try:
        text = short.repr(value)
    except ValueError:  # Python refuses to write integers of more than 4,300 digits
        text = f"a number of {_digits(value)} digits" if isinstance(value, int) else type(value).__name__
    return shortened(text, 2 * longest)


def shortened(text: str, longest: int) -> str:
    """A text of at most about ``longest`` characters: the middle of a longer one becomes ``...``."""
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]}...{text[-(longest - head) :]}"


def _digits(number: int) -> str:
    return f"about {round(number.bit_length() * 0.30103):,}"
