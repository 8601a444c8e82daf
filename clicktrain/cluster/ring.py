"""Time and bytes of a hierarchical ring-allreduce.

Each level is a ring of ``p`` members. From the inside out, members sum up and share out what they have
(reduce-scatter: ``p - 1`` steps, in each of which every member sends a ``p``-th to its neighbor), so that the
next level is left with a ``p``-th in each of ``p`` rings side by side; on the way back they hand round the
sums (allgather: ``p - 1`` steps again). One level alone is the ring-allreduce of Patarasuk and Yuan (2009),
two are that of machines with several GPUs (Mikami et al. 2018; NCCL's rings).

A step takes ``latency + bytes / bandwidth``, where bytes are those that leave a member over one link.
Adding up is not counted: it is faster than any of the links.
"""

from __future__ import annotations

from clicktrain.cluster.links import Cluster


def allreduce_seconds(num_bytes: float, cluster: Cluster, itemsize: int = 4) -> float:
    """Seconds that all GPUs take to sum a message.

    Args:
        num_bytes: of the message, which every GPU has.
        itemsize: bytes of an element; parts of a message are whole elements, and the largest counts.
    """
    pieces = [-(-int(num_bytes) // itemsize)]  # elements, of each of the rings that run side by side
    seconds = 0.0
    for level in cluster.levels:
        if level.size == 1:
            continue
        lanes = [0] * level.lanes
        for ring, elements in enumerate(pieces):
            lanes[ring % level.lanes] += -(-elements // level.size)
        step = level.link.latency + max(lanes) * itemsize / level.link.bandwidth
        seconds += 2 * (level.size - 1) * step
        if level is not cluster.levels[-1]:
            pieces = [part for elements in pieces for part in split(elements, level.size)]
    return seconds


def sent_bytes(num_bytes: float, cluster: Cluster) -> float:
    """Bytes that a GPU sends, on all levels together; the mean over all GPUs."""
    sent, piece = 0.0, float(num_bytes)
    for level in cluster.levels:
        sent += 2 * (level.size - 1) / level.size * piece
        piece /= level.size
    return sent


def split(elements: int, parts: int) -> list[int]:
    """Sizes of the parts of a message: as equal as can be, the larger ones first."""
    size, rest = divmod(elements, parts)
    return [size + (part < rest) for part in range(parts)]
