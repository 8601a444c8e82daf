"""The start of pruning: the loss slope of ClickTrain section 4.1."""

from __future__ import annotations

from clicktrain.sparsity.triggers import SLOPE, History, when_loss_settles


def test_fires_under_the_threshold_and_says_why() -> None:
    def trigger(losses: list[float], slope: float = SLOPE) -> str | None:
        return when_loss_settles(History(len(losses), 90, losses, slope=slope))

    assert SLOPE == 0.27
    assert trigger([]) is None
    assert trigger([2.3]) is None
    assert trigger([2.3, 1.9]) is None
    assert trigger([2.3, 1.9, 1.75]) == "the loss fell by 0.150 in the last epoch, under 0.27"
    assert trigger([1.0, 1.5]) is not None, "a loss that grows has no steep descent"
    assert trigger([2.3, 1.9, 1.75], 0.1) is None
