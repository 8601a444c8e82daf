"""The start of pruning: the loss slope of ClickTrain section 4.1."""

from __future__ import annotations

from clicktrain.sparsity.triggers import SLOPE, History, LossSlope, when_loss_settles


def test_fires_under_the_threshold_and_says_why() -> None:
    def trigger(losses: list[float], slope: LossSlope) -> str | None:
        return when_loss_settles(History(len(losses), 90, losses, batches=10, slope=slope))

    assert SLOPE == 0.27
    mean = LossSlope(of="mean", epochs=1)
    assert trigger([], mean) is None
    assert trigger([2.3], mean) is None
    assert trigger([2.3, 1.9], mean) is None
    assert (
        trigger([2.3, 1.9, 1.75], mean) == "the loss fell by 0.150 an epoch, mean of its batches: under 0.27"
    )
    assert trigger([1.0, 1.5], mean) is not None, "a loss that grows has no steep descent"
    assert trigger([2.3, 1.9, 1.75], LossSlope(0.1, "mean", 1)) is None


def test_the_loss_is_that_of_the_data_set_over_two_epochs() -> None:
    def trigger(losses: list[float]) -> str | None:
        return when_loss_settles(History(len(losses), 90, losses, batches=10))

    assert trigger([2.0, 2.5]) is None, "two epochs have no central difference"
    assert trigger([2.0, 2.5, 1.9]) is None
    said = "the loss fell by 0.200 an epoch, summed over its batches: under 0.27"
    assert trigger([2.0, 2.5, 1.96]) == said
