"""Batches of a stream of shards: read ahead by a thread, decoded by worker processes."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clicktrain.data.loader import Batch, BatchPlan, Finish, PlannedLoader
from clicktrain.data.shards.order import ShardOrder
from clicktrain.data.shards.source import Ints, Sample, ShardSource
from clicktrain.data.streaming import Broken, by_workers, decoded
from clicktrain.errors import UserError

T = TypeVar("T")

_AHEAD = 2  # batches that are read before a worker asks for them


class EncodedBatch(NamedTuple):
    """This process's images of a batch, before they are decoded."""

    batch: int
    numbers: Ints
    """Numbers of the samples in the split, int64 [B]."""
    samples: list[Sample]


class ShardStream:
    """Reads the samples of an epoch that are one process's, piece by piece, and keeps a buffer of them.

    At most ``buffer`` samples and those of one piece are held, of which a process keeps its own.
    """

    def __init__(self, source: ShardSource, plan: BatchPlan, epoch: int) -> None:
        self._source, self._plan = source, plan
        self._order = ShardOrder(source.pieces.counts, source.buffer, plan.seed, epoch, shuffle=plan.shuffle)
        self._held: dict[int, Sample] = {}  # by position
        self.most_held = 0
        """Most samples that were in memory at once."""

    def batches(self, start_batch: int) -> Iterator[EncodedBatch]:
        """Yield this process's part of the batches of the epoch, from a batch on."""
        order, plan = self._order, self._plan
        batches = plan.batches(start_batch)
        if not batches:
            return
        first = plan.rows(batches[0]).start // order.buffer * order.buffer
        at = int(np.searchsorted(order.ends, first, side="right"))  # the piece that has this place
        for batch in batches:
            rows = plan.rows(batch)
            # the buffer moves with the batches, so that reading is as steady as training
            needed = min(rows.stop + order.buffer - 1, order.total)
            while not at or (at < len(order.ends) and order.ends[at - 1] < needed):
                self._read(at, first, start_batch)
                at += 1
            positions = range(rows.start, rows.stop)
            samples = [self._held.pop(position) for position in positions]
            yield EncodedBatch(batch, order.numbers(order.places(rows.start, rows.stop)), samples)

    def _read(self, at: int, first: int, start_batch: int) -> None:
        """Read this process's samples of the piece that is the ``at``-th of the epoch, from a place on."""
        piece = self._source.pieces[int(self._order.pieces[at])]
        end = int(self._order.ends[at])
        start = max(end - piece.rows, first)
        positions = self._order.positions(start, end)
        own = self._plan.owned(torch.from_numpy(positions), start_batch).numpy()
        rows = (np.flatnonzero(own) + (piece.first + piece.rows - (end - start))).tolist()
        if not rows:
            return
        samples = self._source.reader.read(piece, rows)
        for row, sample in zip(rows, samples, strict=True):
            if not 0 <= sample.label < self._source.num_classes:
                name = self._source.reader.name(piece, row)
                raise UserError(
                    f"{name} has label {sample.label}, which its index has not: the shard has changed; start "
                    "again"
                )
        self._held.update(zip(positions[own].tolist(), samples, strict=True))
        self.most_held = max(self.most_held, len(self._held))


@dataclass(frozen=True)
class _Item:
    epoch: int
    numbers: list[int]
    images: list[bytes]
    labels: list[int]


class _Decoded(Dataset["tuple[Tensor, Tensor] | Broken"]):
    """Turns an `_Item` into uint8 [B, C, H, W] and int64 [B]."""

    def __init__(self, source: ShardSource, resized_crop: bool, seed: int) -> None:
        self._source, self._resized_crop, self._seed = source, resized_crop, seed

    def __getitem__(self, item: _Item) -> tuple[Tensor, Tensor] | Broken:
        crops = (self._seed, item.epoch) if self._resized_crop else None
        pixels = []
        for number, data in zip(item.numbers, item.images, strict=True):
            try:
                pixels.append(decoded(self._source, data, "", number, crops))
            except UserError:  # only now is it worth while to look up the name
                try:
                    decoded(self._source, data, self._source.name(number), number, crops)
                except UserError as error:
                    return Broken(str(error))
                raise
        return torch.stack(pixels), torch.tensor(item.labels, dtype=torch.int64)


class ShardLoader(PlannedLoader):
    """Streams shards: a thread reads, ``workers`` processes (0: this one) decode, the device augments.

    What a worker gets are bytes, so that every process reads a piece once, however many workers it has.
    """

    def __init__(
        self, source: ShardSource, plan: BatchPlan, finish: Finish, device: torch.device, workers: int
    ) -> None:
        self._dataset = _Decoded(source, finish.augment.resized_crop, finish.seed)
        super().__init__(plan, replace(finish, augment=replace(finish.augment, resized_crop=False)), device)
        self._source, self._workers = source, workers

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        stream = ShardStream(self._source, self._plan, epoch).batches(start_batch)
        sent: list[EncodedBatch] = []  # without their samples
        ahead = read_ahead(stream, _AHEAD)
        try:
            for ready in by_workers(self._dataset, _items(ahead, epoch, sent), self._workers, self._device):
                if isinstance(ready, Broken):
                    raise UserError(ready.message)
                batch, numbers, _ = sent.pop(0)
                images, labels = (tensor.to(self._device, non_blocking=True) for tensor in ready)
                alternating, seed = self._finish.augment.alternating, self._finish.seed
                mirrored = mirrored_numbers(numbers, seed, epoch) if alternating else None
                yield Batch(self._finish(images, epoch, batch, self._plan, mirrored), labels)
        finally:
            ahead.close()


def _items(ahead: Iterable[EncodedBatch], epoch: int, sent: list[EncodedBatch]) -> Iterator[_Item]:
    """Yield what workers decode, and note the batches it is of."""
    for encoded in ahead:
        sent.append(encoded._replace(samples=[]))
        images = [sample.data for sample in encoded.samples]
        yield _Item(epoch, encoded.numbers.tolist(), images, [sample.label for sample in encoded.samples])


def mirrored_numbers(numbers: Ints, seed: int, epoch: int) -> Tensor:
    """Which samples alternating flips mirror in an epoch, bool [B]: see `augment.mirrored_in_epoch`.

    Half of them in the first epoch, by a hash of their numbers (the finalizer of SplitMix64), so that nothing
    is kept for each image.
    """
    bits = numbers.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    first = ((bits ^ (bits >> np.uint64(31))) & np.uint64(1)).astype(bool)
    return torch.from_numpy(first) ^ bool(epoch % 2)


def read_ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield items that a thread takes from ``items``, up to ``depth`` of them ahead; its errors are raised.

    The thread starts with the first item that is asked for, and ends before `close` returns.
    """
    ready: SimpleQueue[tuple[str, T | BaseException | None]] = SimpleQueue()
    free = threading.Semaphore(depth)
    stopped = threading.Event()

    def fill() -> None:
        try:
            while free.acquire() and not stopped.is_set():
                ready.put(("item", next(items)))
        except StopIteration:
            ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))

    thread = threading.Thread(target=fill, name="shards", daemon=True)
    thread.start()
    try:
        while True:
            what, value = ready.get()
            if what == "end":
                return
            if what == "error":
                assert isinstance(value, BaseException)
                raise value
            free.release()
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        free.release()
        thread.join()
