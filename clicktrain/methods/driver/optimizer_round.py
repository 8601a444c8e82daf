"""When several optimizers have taken one step together."""

from __future__ import annotations

from collections.abc import Sequence

from clicktrain.errors import UserError
from clicktrain.methods.driver.loop_watch import STRIKES
from clicktrain.methods.driver.optimizers import OptimizerUnit


class OptimizerRound:
    """One step each of the optimizers that hold weights to be pruned; see `Pruner`."""

    def __init__(self) -> None:
        self._stepped: list[OptimizerUnit] = []
        self._seen = -1
        self._broken = 0

    def begins(self, seen: int) -> bool:
        """Whether gradients are new to the method: the first step after `Pruner.observe`.

        Raises:
            UserError: again and again an optimizer has not stepped between two of these.
        """
        if seen == self._seen:
            return False
        self._broken = self._broken + 1 if self._stepped else 0
        if self._broken >= STRIKES:
            raise UserError(
                "the attached optimizers hold weights to be pruned together but do not step together: after "
                "each backward() and observe(loss) let every one of them step once, or, where networks take "
                "turns (a GAN), attach one method to each network with its own optimizer"
            )
        self._stepped, self._seen = [], seen
        return True

    def ends(self, unit: OptimizerUnit, counted: Sequence[OptimizerUnit]) -> bool:
        """Note a step; whether every optimizer that counts has now stepped."""
        if unit not in self._stepped:
            self._stepped.append(unit)
        if any(other not in self._stepped for other in counted):
            return False
        self._stepped = []
        return True
