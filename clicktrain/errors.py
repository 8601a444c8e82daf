"""The one exception that stands for a mistake of the user's."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what was asked for: one sentence that says what is wrong and what would be right.

    The command line prints the sentence without a traceback and exits with code 2.
    """
