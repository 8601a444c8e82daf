"""The cheapest layout for each node of a graph: an integer program over any number of layouts.

With two layouts its relaxation is a minimum cut, so the solver has nothing to branch on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PLAIN = "plain"
"""The model's own layout, ``[N, C, H, W]``: what is in no unit is in it, and conversions go through it."""
_SCALE = 1e6
"""All costs together are scaled to this, far above the solver's absolute tolerances."""
_TIE = 1e-2
"""Share of `_SCALE` that decides between equal costs: it counts nodes outside the plain layout."""

Costs = Mapping[str, Mapping[str, float]]
"""Node -> layout -> cost; a layout that is missing is impossible."""


@dataclass(frozen=True, slots=True)
class Value:
    """What one node computes and others read; None is a producer or reader in the plain layout.

    ``enter`` and ``leave`` are the costs of converting the plain value into a layout, and out of it.
    """

    producer: str | None
    consumers: tuple[str | None, ...]
    enter: Mapping[str, float]
    leave: Mapping[str, float]

    def conversion_cost(self, layouts: Mapping[str, str]) -> float:
        """Cost of its conversions where nodes have these layouts; each copy is made once."""
        own = PLAIN if self.producer is None else layouts[self.producer]
        wanted = {PLAIN if name is None else layouts[name] for name in self.consumers} - {own}
        if not wanted:
            return 0.0
        left = 0.0 if own == PLAIN else self.leave[own]
        return left + sum(self.enter[layout] for layout in wanted - {PLAIN})


def total_cost(costs: Costs, values: Sequence[Value], layouts: Mapping[str, str]) -> float:
    """The sum that `cheapest_layouts` minimizes: of the nodes' costs and of the conversions."""
    own = sum(costs[name][layout] for name, layout in layouts.items())
    return own + sum(value.conversion_cost(layouts) for value in values)


def cheapest_layouts(costs: Costs, values: Sequence[Value]) -> dict[str, str]:
    """Choose the layout of every node so that `total_cost` is smallest.

    Costs are not negative, of at least one layout for each node. Of equal costs, the choice with the most
    nodes in the plain layout is taken.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    if not costs:
        return {}
    program = _Program(costs, values)
    total = sum(program.objective)
    objective = np.array(program.objective) * (_SCALE / total if total > 0 else 1.0)
    for (_, layout), variable in program.chosen.items():
        objective[variable] += 0.0 if layout == PLAIN else _TIE / len(costs)
    rows, columns, numbers = zip(*program.entries, strict=True)
    size = len(program.least), len(objective)
    matrix = coo_array((numbers, (rows, columns)), shape=size).tocsr()
    # Conversions are whole where choices are.
    whole = np.zeros(len(objective))
    whole[list(program.chosen.values())] = 1
    constraints = LinearConstraint(matrix, program.least, program.most)
    options = {"mip_rel_gap": 0.0}
    result = milp(objective, integrality=whole, bounds=Bounds(0, 1), constraints=constraints, options=options)
    if result.x is None:
        raise RuntimeError(f"no layouts could be chosen: {result.message}")
    return {name: layout for (name, layout), i in program.chosen.items() if result.x[i] > 0.5}


class _Program:
    """Variables from 0 to 1, the cost of each, and sparse rows ``least <= row <= most``."""

    def __init__(self, costs: Costs, values: Sequence[Value]) -> None:
        self.objective: list[float] = []
        self.entries: list[tuple[int, int, float]] = []
        self.least: list[float] = []
        self.most: list[float] = []
        self.chosen: dict[tuple[str, str], int] = {}
        for name, by_layout in costs.items():
            for layout, cost in by_layout.items():
                self.chosen[name, layout] = self._variable(cost)
            self._row({self.chosen[name, layout]: 1 for layout in by_layout}, 1, 1)
        for value in values:
            self._conversions(value, costs)

    def _variable(self, cost: float) -> int:
        self.objective.append(cost)
        return len(self.objective) - 1

    def _row(self, numbers: Mapping[int, float], least: float, most: float = float("inf")) -> None:
        self.entries += [(len(self.least), variable, number) for variable, number in numbers.items()]
        self.least.append(least)
        self.most.append(most)

    def _conversions(self, value: Value, costs: Costs) -> None:
        """Rows that make the conversions of a value happen where its consumers want it otherwise."""
        produced = [PLAIN] if value.producer is None else [*costs[value.producer]]
        leave = {one: self._variable(value.leave[one]) for one in produced if one != PLAIN}
        enter: dict[str, int] = {}
        for consumer in dict.fromkeys(value.consumers):
            for layout in [PLAIN] if consumer is None else costs[consumer]:
                wanted = {} if consumer is None else {self.chosen[consumer, layout]: 1.0}
                missing = 1.0 - len(wanted)  # 1 where the consumer's layout is given
                if layout != PLAIN:
                    if layout not in enter:
                        enter[layout] = self._variable(value.enter[layout])
                    # enter[l] >= consumer is in l - producer is in l
                    own = self._chosen(value.producer, layout)
                    self._row({enter[layout]: 1, **_minus(wanted), **own}, missing)
                for one, variable in leave.items():
                    if one != layout:
                        # leave[p] >= producer is in p + consumer is in l - 1
                        produced_in = _minus(self._chosen(value.producer, one))
                        self._row({variable: 1, **produced_in, **_minus(wanted)}, missing - 1)

    def _chosen(self, name: str | None, layout: str) -> dict[int, float]:
        variable = None if name is None else self.chosen.get((name, layout))
        return {} if variable is None else {variable: 1.0}


def _minus(numbers: Mapping[int, float]) -> dict[int, float]:
    return {variable: -number for variable, number in numbers.items()}
