"""The order of a stream of shards, against one that is written out with lists."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clicktrain.data.draws import Part, seeded_generator
from clicktrain.data.loader import BatchPlan
from clicktrain.data.shards.order import ShardOrder
from clicktrain.data.shards.source import Pieces

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def written_out(counts: list[int], buffer: int, seed: int, epoch: int) -> list[int]:
    """Numbers of the samples: pieces shuffled, then each run of ``buffer`` samples."""
    numbers, pieces = 0, []
    for count in counts:
        pieces.append(list(range(numbers, numbers + count)))
        numbers += count
    order = torch.randperm(len(counts), generator=seeded_generator("pieces", seed, epoch)).tolist()
    stream = [number for piece in order for number in pieces[piece]]
    buffer = min(buffer, len(stream))
    out: list[int] = []
    for window, start in enumerate(range(0, len(stream), buffer)):
        run = stream[start : start + buffer]
        shuffled = torch.randperm(len(run), generator=seeded_generator("buffer", seed, epoch, window))
        out += [run[place] for place in shuffled.tolist()]
    return out


@settings(max_examples=40, deadline=None)
@given(COUNTS, st.integers(1, 30), st.integers(0, 3), st.data())
def test_any_run_of_positions_is_that_of_the_whole_epoch(
    counts: list[int], buffer: int, epoch: int, data: st.DataObject
) -> None:
    expected = written_out(counts, buffer, 5, epoch)
    assert sorted(expected) == list(range(sum(counts)))
    order = ShardOrder(np.array(counts), buffer, 5, epoch, shuffle=True)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    places = order.places(start, stop)
    assert order.numbers(places).tolist() == expected[start:stop]
    positions = order.positions(start, stop)
    assert [int(order.places(p, p + 1)[0]) for p in positions.tolist()] == list(range(start, stop))


def test_epochs_and_seeds_differ_and_validation_is_in_order() -> None:
    counts = np.array([5, 7, 3, 9])

    def numbers(seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
        order = ShardOrder(counts, 8, seed, epoch, shuffle=shuffle)
        return order.numbers(order.places(0, order.total)).tolist()

    assert len({tuple(numbers(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert numbers(0, 3, shuffle=False) == list(range(24))


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.integers(4, 12), st.integers(1, 4), st.booleans(), st.booleans(), st.data())
def test_positions_of_a_process_are_the_rows_of_its_batches(
    images: int, batch_size: int, processes: int, shuffle: bool, drop_last: bool, data: st.DataObject
) -> None:
    for index in range(processes):
        plan = BatchPlan(images, batch_size, drop_last, shuffle, 0, Part(index, processes))
        start = data.draw(st.integers(0, len(plan)))
        rows = [plan.rows(batch) for batch in plan.batches(start)]
        expected = {position for run in rows for position in range(run.start, run.stop)}
        owned = plan.owned(torch.arange(images), start)
        assert set(owned.nonzero().flatten().tolist()) == expected


@settings(max_examples=40, deadline=None)
@given(COUNTS.filter(lambda counts: sum(counts) > 1), st.data())
def test_holding_out_takes_exactly_as_many_and_each_once(counts: list[int], data: st.DataObject) -> None:
    table, row = [], 0
    for count in counts:
        table.append((0, 0, 0, row, count))
        row += count
    samples = data.draw(st.integers(1, row - 1))
    rest, held = Pieces(np.array(table)).hold_out(samples, seed=3)
    assert held.samples == samples
    rows = [
        r for part in (rest, held) for piece in part for r in range(piece.first, piece.first + piece.rows)
    ]
    assert sorted(rows) == list(range(row))
    again = Pieces(np.array(table)).hold_out(samples, seed=3)[1]
    assert (again.table == held.table).all()
