"""The start of pruning: the loss slope of ClickTrain section 4.1."""

from __future__ import annotations

from clicktrain.sparsity.triggers import LossSlope


def test_fires_under_the_threshold_and_says_why() -> None:
    trigger = LossSlope()
    assert trigger.threshold == 0.27
    assert trigger.fires([]) is None
    assert trigger.fires([2.3]) is None
    assert trigger.fires([2.3, 1.9]) is None
    assert trigger.fires([2.3, 1.9, 1.75]) == "the loss fell by 0.150 in the last epoch, under 0.27"
    assert trigger.fires([1.0, 1.5]) is not None, "a loss that grows has no steep descent"
    assert LossSlope(0.1).fires([2.3, 1.9, 1.75]) is None
