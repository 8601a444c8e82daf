"""Weights of a program as bytes: nonzero ones, and one bit a weight where they are not all there.

A header of 64 bytes (``runtime.c``), then for each operation its bias or shift, its values, and its bits,
each at a multiple of 64 bytes. Dense convolutions are [F / 4, C / groups, R, S, 4], dense linear layers
[O / 16, I, 16], zeros filling up; sparse ones have the values of one filter after another. float32, little
endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clicktrain.inference.program import Affine, Array, Conv, Op, Program

MAGIC = b"CTWEIGHT"
VERSION = 1
HEADER = 64
_ORDER = 0x01020304
_FILTERS = 4
_OUTPUTS = 16
_DENSE = 0.6
"""Density from which all weights are kept: four filters then share each load."""
_MOST_INPUTS = 65535
"""Inputs of a sparse layer that its offsets can number."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Places of one operation's weights, in bytes from the start of the file; -1 for what it has not."""

    bias: int = -1
    values: int = -1
    bits: int = -1
    count: int = 0
    dense: bool = False


class WeightFile:
    """Collects weights; `finish` makes the bytes."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = HEADER

    def add(self, program: Program) -> list[Stored]:
        """Append the weights of all operations; where they are."""
        return [self._one(op) for op in program.ops]

    def _one(self, op: Op) -> Stored:
        if isinstance(op, Conv):
            return self._conv(op)
        return self._affine(op) if isinstance(op, Affine) else Stored()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def finish(self, fingerprint: int) -> bytes:
        """The file; ``fingerprint``, 64 bits, is the network's."""
        body = b"".join(self._parts)
        head = struct.pack("<8sIIQQQ", MAGIC, VERSION, _ORDER, fingerprint, self._size, checksum(body))
        return head.ljust(HEADER, b"\0") + body

    def _append(self, array: NDArray[np.generic]) -> int:
        at, data = self._size, array.tobytes()
        data += b"\0" * (-len(data) % 64)
        self._parts.append(data)
        self._size += len(data)
        return at

    def _floats(self, array: Array) -> int:
        return self._append(array.astype("<f4"))

    def _affine(self, op: Affine) -> Stored:
        shift = self._floats(op.shift) if np.any(op.shift) else -1
        scale = self._floats(op.scale) if np.any(op.scale != 1) else -1
        return Stored(bias=shift, values=scale)

    def _conv(self, op: Conv) -> Stored:
        weight = op.weight.astype("<f4")
        side = _OUTPUTS if op.linear else _FILTERS
        f = weight.shape[0]
        bias = self._floats(np.pad(op.bias, (0, -f % side)))
        kept = weight != 0
        count = int(np.count_nonzero(kept))
        shares = f // op.groups >= _FILTERS or op.linear
        inputs = op.input.shape[0]
        if (shares and count >= _DENSE * weight.size) or (op.linear and inputs > _MOST_INPUTS):
            groups = 1 if op.linear else op.groups
            parts = weight.reshape(groups, f // groups, -1)
            parts = np.pad(parts, ((0, 0), (0, -parts.shape[1] % side), (0, 0)))
            values = parts.reshape(groups, parts.shape[1] // side, side, -1).swapaxes(2, 3)
            return Stored(bias, self._append(np.ascontiguousarray(values)), -1, weight.size, True)
        bits = np.packbits(kept.reshape(-1), bitorder="little")
        return Stored(bias, self._append(weight[kept]), self._append(bits), count, False)


def checksum(body: bytes) -> int:
    """Sum of all words, each times an odd number of its own, modulo 2**64."""
    words = np.frombuffer(body, "<u8")
    with np.errstate(over="ignore"):
        odd = 2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1)
        return int((words * odd).sum(dtype=np.uint64))
