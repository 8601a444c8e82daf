"""The cheapest way to give each node of a graph one of two labels: a minimum s-t cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SCALE = 1 << 28
"""Costs are turned into whole numbers of this resolution: the flow algorithm counts in 32 bits."""


@dataclass(frozen=True, slots=True)
class Value:
    """What one node computes and others read.

    Attributes:
        producer: who computes it; None for one that is there in the plain layout.
        consumers: who reads it; None among them for one that reads the plain layout.
        to_blocked: cost if it is computed plain and some consumer wants it blocked.
        to_plain: cost if it is computed blocked and some consumer wants it plain.
    """

    producer: str | None
    consumers: tuple[str | None, ...]
    to_blocked: float
    to_plain: float


def cheapest_layouts(
    costs: Mapping[str, tuple[float | None, float | None]], values: Sequence[Value]
) -> dict[str, bool]:
    """Which nodes to compute blocked so that the sum of all costs is smallest.

    A value is converted once, however many consumers want it: an auxiliary node stands for the copy in the
    other layout.

    Args:
        costs: node -> (plain, blocked) in any unit, not negative; None for what is impossible, not both.
        values: producers and consumers are keys of ``costs``.

    Returns:
        node -> True for blocked. Where both cost the same, plain.
    """
    number = {name: 2 + i for i, name in enumerate(costs)}
    source, sink = 0, 1  # with the source: blocked; with the sink: plain
    edges: list[tuple[int, int, float | None]] = []
    for name, (plain, blocked) in costs.items():
        edges.append((source, number[name], plain))  # cut if the node is plain
        edges.append((number[name], sink, blocked))  # cut if it is blocked
    size = 2 + len(number)
    for value in values:
        producer = sink if value.producer is None else number[value.producer]
        consumers = {sink if c is None else number[c] for c in value.consumers}
        if value.producer is not None:
            # The copy is on the blocked side only if all consumers are; else a blocked producer pays.
            edges.append((producer, size, value.to_plain))
            edges.extend((size, consumer, None) for consumer in consumers)
            size += 1
        wanting = consumers - {sink}
        if wanting:
            edges.append((size, producer, value.to_blocked))
            edges.extend((consumer, size, None) for consumer in wanting)
            size += 1
    with_source = _source_side(size, edges, source, sink)
    return {name: node in with_source for name, node in number.items()}


def total_cost(
    costs: Mapping[str, tuple[float | None, float | None]],
    values: Sequence[Value],
    blocked: Mapping[str, bool],
) -> float:
    """What `cheapest_layouts` makes small, of a choice: the nodes' costs and the conversions."""
    total = sum(costs[name][int(there)] or 0.0 for name, there in blocked.items())
    for value in values:
        there = value.producer is not None and blocked[value.producer]
        wanted = {consumer is not None and blocked[consumer] for consumer in value.consumers}
        if (not there) in wanted:
            total += value.to_plain if there else value.to_blocked
    return total


def _source_side(
    size: int, edges: Sequence[tuple[int, int, float | None]], source: int, sink: int
) -> set[int]:
    """Nodes on the source's side of the smallest minimum cut; None is a capacity that is never cut."""
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    total = sum(capacity for _, _, capacity in edges if capacity is not None)
    unit = _SCALE / total if total > 0 else 1.0
    never = 2 * _SCALE
    capacities: dict[tuple[int, int], int] = {}
    for tail, head, capacity in edges:
        if tail != head:
            amount = never if capacity is None else round(capacity * unit)
            capacities[tail, head] = min(capacities.get((tail, head), 0) + amount, never)
    rows, columns = zip(*capacities, strict=True) if capacities else ((), ())
    data = np.array(list(capacities.values()), dtype=np.int32)
    graph = coo_array((data, (rows, columns)), shape=(size, size)).tocsr()
    flow = maximum_flow(graph, source, sink).flow
    residual = (graph - flow).tocoo()
    open_edges: dict[int, list[int]] = {}
    for tail, head, left in zip(residual.row, residual.col, residual.data, strict=True):
        if left > 0:
            open_edges.setdefault(int(tail), []).append(int(head))
    reached, todo = {source}, [source]
    while todo:
        for head in open_edges.get(todo.pop(), ()):
            if head not in reached:
                reached.add(head)
                todo.append(head)
    return reached
