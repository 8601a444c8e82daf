"""The one exception that stands for a mistake of the user's, and the warning of a run that fell short."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what was asked for: one sentence that says what is wrong and what would be right.

    The command line prints the sentence without a traceback and exits with code 2.
    """


class NetworkCollapsed(UserError):  # noqa: N818 - reads as a sentence to the user
    """Pruning has destroyed the network: training on would be in vain."""


class MissedTarget(UserWarning):
    """A run ended more than 5% of what was asked away from it; the warning says what, and why if known."""
