"""The chosen layouts against trying everything, with two layouts and with more."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.compiler.layout_choice import PLAIN, Value, cheapest_layouts, total_cost

Costs = dict[str, dict[str, float]]


def total(costs: Costs, values: list[Value], layouts: dict[str, str]) -> float:
    """What an assignment costs, from the definition."""
    cost = sum(costs[name][layout] for name, layout in layouts.items())
    for value in values:
        own = PLAIN if value.producer is None else layouts[value.producer]
        wanted = {PLAIN if c is None else layouts[c] for c in value.consumers}
        if wanted <= {own}:
            continue
        if own != PLAIN:
            cost += value.leave[own]
        cost += sum(value.enter[layout] for layout in wanted if layout not in (own, PLAIN))
    return cost


def every(costs: Costs) -> list[dict[str, str]]:
    return [dict(zip(costs, one, strict=True)) for one in itertools.product(*costs.values())]


@st.composite
def graphs(draw: st.DrawFn, layouts: tuple[str, ...]) -> tuple[Costs, list[Value]]:
    names = [f"n{i}" for i in range(draw(st.integers(1, 6 if len(layouts) == 2 else 5)))]
    number = st.integers(0, 20).map(float)
    costs: Costs = {}
    for name in names:
        possible = draw(st.sets(st.sampled_from(layouts), min_size=1))
        costs[name] = {layout: draw(number) for layout in layouts if layout in possible}
    values = []
    for i in range(-1, len(names)):
        consumers = draw(st.lists(st.sampled_from([*names[i + 1 :], None]), max_size=3))
        enter, leave = ({layout: draw(number) for layout in layouts[1:]} for _ in range(2))
        values.append(Value(None if i < 0 else names[i], tuple(consumers), enter, leave))
    return costs, values


@pytest.mark.parametrize("layouts", [(PLAIN, "a"), (PLAIN, "a", "b"), (PLAIN, "a", "b", "c")], ids=len)
@given(data=st.data())
def test_no_assignment_is_cheaper(layouts: tuple[str, ...], data: st.DataObject) -> None:
    costs, values = data.draw(graphs(layouts))
    chosen = cheapest_layouts(costs, values)
    cost = total(costs, values, chosen)
    assert total_cost(costs, values, chosen) == cost
    assignments = [(total(costs, values, one), one) for one in every(costs)]
    least = min(cost for cost, _ in assignments)
    assert cost == pytest.approx(least, rel=1e-6)
    moved = [sum(layout != PLAIN for layout in one.values()) for cost, one in assignments if cost == least]
    assert sum(layout != PLAIN for layout in chosen.values()) == min(moved)


def conversion(ms: float) -> tuple[dict[str, float], dict[str, float]]:
    return {"a": ms}, {"a": ms}


def test_a_layer_that_does_not_pay_its_conversions_stays_plain() -> None:
    costs: Costs = {"first": {PLAIN: 0.0}, "b": {PLAIN: 5.0, "a": 3.0}, "last": {PLAIN: 0.0}}
    values = [Value("first", ("b",), *conversion(1.5)), Value("b", ("last",), *conversion(1.5))]
    assert cheapest_layouts(costs, values)["b"] == PLAIN
    costs["b"] = {PLAIN: 7.0, "a": 3.0}
    assert cheapest_layouts(costs, values)["b"] == "a"


def test_a_value_is_converted_once_for_all_who_want_it() -> None:
    costs: Costs = {"first": {PLAIN: 0.0}}
    costs |= {f"b{i}": {PLAIN: 2.0, "a": 1.0} for i in range(4)}
    chosen = cheapest_layouts(costs, [Value("first", tuple(costs)[1:], *conversion(3.0))])
    assert chosen == {"first": PLAIN, "b0": "a", "b1": "a", "b2": "a", "b3": "a"}


def test_an_empty_graph_has_no_layouts() -> None:
    assert cheapest_layouts({}, []) == {}
