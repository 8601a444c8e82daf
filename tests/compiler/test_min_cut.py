"""The minimum cut against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.compiler.min_cut import Value, cheapest_layouts, total_cost


def total(
    costs: dict[str, tuple[float | None, float | None]], values: list[Value], blocked: dict[str, bool]
) -> float:
    """What an assignment costs, from the definition; infinite if it is impossible."""
    cost = 0.0
    for name, pair in costs.items():
        own = pair[int(blocked[name])]
        cost += float("inf") if own is None else own
    for value in values:
        produced = value.producer is not None and blocked[value.producer]
        wanted = {c is not None and blocked[c] for c in value.consumers}
        if produced and False in wanted:
            cost += value.to_plain
        if not produced and True in wanted:
            cost += value.to_blocked
    return cost


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, tuple[float | None, float | None]], list[Value]]:
    names = [f"n{i}" for i in range(draw(st.integers(1, 6)))]
    number = st.integers(0, 20).map(float)
    pair = st.one_of(st.tuples(number, number), st.tuples(st.none(), number), st.tuples(number, st.none()))
    costs = {name: draw(pair) for name in names}
    values = []
    for i in range(-1, len(names)):
        later = [*names[i + 1 :], None]
        consumers = draw(st.lists(st.sampled_from(later), max_size=3))
        values.append(Value(None if i < 0 else names[i], tuple(consumers), draw(number), draw(number)))
    return costs, values


@given(graph=graphs())
def test_no_assignment_is_cheaper(
    graph: tuple[dict[str, tuple[float | None, float | None]], list[Value]],
) -> None:
    costs, values = graph
    chosen = cheapest_layouts(costs, values)
    found = total(costs, values, chosen)
    assert total_cost(costs, values, chosen) == found
    every = (
        dict(zip(costs, bits, strict=True)) for bits in itertools.product((False, True), repeat=len(costs))
    )
    assert found == pytest.approx(min(total(costs, values, one) for one in every), rel=1e-6)


def test_a_layer_that_does_not_pay_its_conversions_stays_plain() -> None:
    costs: dict[str, tuple[float | None, float | None]] = {
        "a": (0.0, None),
        "b": (5.0, 3.0),
        "c": (0.0, None),
    }
    values = [Value("a", ("b",), 1.5, 1.5), Value("b", ("c",), 1.5, 1.5)]
    assert not cheapest_layouts(costs, values)["b"]
    costs["b"] = (7.0, 3.0)
    assert cheapest_layouts(costs, values)["b"]


def test_a_value_is_converted_once_for_all_who_want_it() -> None:
    costs: dict[str, tuple[float | None, float | None]] = {"a": (0.0, None)}
    costs |= {f"b{i}": (2.0, 1.0) for i in range(4)}
    found = cheapest_layouts(costs, [Value("a", tuple(costs)[1:], 3.0, 3.0)])
    assert found == {"a": False, "b0": True, "b1": True, "b2": True, "b3": True}
