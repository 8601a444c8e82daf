"""How a kernel cuts its work, and what that takes of a multiprocessor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from clicktrain.errors import UserError
from clicktrain.kernels.impls import Phase

CODES = ("blocks", "rows")
PRECISIONS = ("ieee", "tf32")
_POWERS = tuple(1 << power for power in range(4, 10))
LEAST_DOT = 16
"""Rows, columns and keys of the smallest tile that Triton multiplies."""


@dataclass(frozen=True, slots=True)
class Tile:
    """The sizes of a kernel's tiles.

    Attributes:
        code: ``blocks``: rows that share their positions, on tensor cores; ``rows``: each by itself.
        m: rows of a program (``rows`` of wgrad has one).
        bq: columns, images of one position or of several.
        bk: keys at a time (of ``rows`` in forward and dgrad: one).
        warps, stages: of a program, and of its pipeline.
        precision: ``ieee``, or ``tf32`` to multiply float32 numbers with 10 bits of mantissa.
        cached: whether what is gathered goes through L1, where neighboring taps find it again.
        splits: into how many parts wgrad cuts its columns; 0 for as many as fill the GPU.
    """

    code: str = "blocks"
    m: int = 64
    bq: int = 128
    bk: int = 32
    warps: int = 4
    stages: int = 3
    precision: str = "ieee"
    cached: bool = False
    splits: int = 0

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"code is {' or '.join(CODES)}, not {self.code!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {' or '.join(PRECISIONS)}, not {self.precision!r}")
        least = LEAST_DOT if self.code == "blocks" else 1
        for name in ("m", "bq", "bk"):
            size = getattr(self, name)
            if not _whole(size) or size < least or size > _POWERS[-1] or size & (size - 1):
                raise ValueError(
                    f"{name} of a tile is a power of two from {least} to {_POWERS[-1]}, not {size!r}"
                )
        for name, most in (("warps", 16), ("stages", 8), ("splits", 1 << 16)):
            size = getattr(self, name)
            if not _whole(size) or not 0 <= size <= most:
                raise ValueError(f"{name} of a tile is a whole number up to {most}, not {size!r}")
        if self.warps not in (1, 2, 4, 8, 16) or self.stages < 1:
            raise ValueError(f"a tile has 1, 2, 4, 8 or 16 warps and at least one stage, not {self}")
        if not isinstance(self.cached, bool):
            raise ValueError(f"cached is true or false, not {self.cached!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tile:
        """Inverse of ``asdict``; ValueError for other fields or values."""
        known = {one.name for one in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"a tile of Triton's kernels has no {', '.join(map(str, unknown))}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        extra = "".join(
            [f" {self.precision}" * (self.precision != "ieee"), " L1" * self.cached,
             f" /{self.splits}" * (self.splits > 0)]
        )  # fmt: skip
        return f"{self.code} {self.m}x{self.bq}x{self.bk} w{self.warps} s{self.stages}{extra}"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_tile(phase: Phase, value: Any) -> Tile:
    """A tile from JSON, or one to check, as `Impl.read_tiling` has it."""
    if not isinstance(value, Tile):
        if not isinstance(value, Mapping):
            raise ValueError(f"a tiling is an object, not {str(value)[:60]!r}")
        value = Tile.from_dict(value)
    tile: Tile = value
    if value.splits and phase != "wgrad":
        raise UserError(f"cannot split the sums of {phase}: set the tiling's splits to 0")
    if value.cached and (phase == "wgrad" or value.code == "rows"):
        raise UserError(
            f"has no choice of L1 in {phase} with {value.code} code: set the tiling's cached to false"
        )
    return tile


def images_of_tile(n: int, bq: int) -> int:
    """How many images of one position a tile of ``bq`` columns takes: the fewest columns left over.

    At least 8, so that what a thread reads is 16 bytes; of equally good sizes the largest.
    """
    sizes = [size for size in (1 << power for power in range(3, 10)) if size <= bq]
    return min(sizes or [bq], key=lambda size: (-(-n // size) * size, -size))


@dataclass(frozen=True, slots=True)
class Multiprocessor:
    """What programs on one multiprocessor share. From the CUDA C++ Programming Guide, compute capabilities.

    Attributes:
        shared: bytes of shared memory that programs may have, all together.
        shared_each: bytes that one program may have.
    """

    registers: int = 65536
    shared: int = 228 << 10
    shared_each: int = 227 << 10
    threads: int = 2048
    programs: int = 32


MULTIPROCESSORS: Mapping[int, Multiprocessor] = {
    80: Multiprocessor(shared=164 << 10, shared_each=163 << 10),
    86: Multiprocessor(shared=100 << 10, shared_each=99 << 10, threads=1536, programs=16),
    89: Multiprocessor(shared=100 << 10, shared_each=99 << 10, threads=1536, programs=24),
    90: Multiprocessor(),
    100: Multiprocessor(),
    120: Multiprocessor(shared=100 << 10, shared_each=99 << 10, threads=1536, programs=24),
}
"""By compute capability, two or three digits without the point."""
_RESERVED = 1 << 10
"""Bytes of shared memory that the driver keeps for itself in each program."""
_ADDRESSING = 40
"""Registers of a thread beside its sums: addresses, offsets, masks."""


def shared_bytes(tile: Tile, phase: Phase, itemsize: int) -> int:
    """Bytes of shared memory that the operands of a program's pipeline take; 0 where it has none."""
    if tile.code == "rows":
        return 0
    operands = tile.m + tile.bk if phase == "wgrad" else tile.m + tile.bq
    depth = tile.bq if phase == "wgrad" else tile.bk
    return tile.stages * operands * depth * itemsize


def registers_of(tile: Tile, phase: Phase) -> int:
    """Registers that a thread wants: its share of the sums, and what addresses take. An estimate."""
    if tile.code == "rows":
        sums = (tile.bk if phase == "wgrad" else tile.m) * tile.bq
    else:
        sums = tile.m * (tile.bk if phase == "wgrad" else tile.bq)
    return sums // (32 * tile.warps) + _ADDRESSING


def programs_at_once(
    registers: int, shared: int, warps: int, multiprocessor: Multiprocessor = MULTIPROCESSORS[90]
) -> int:
    """Programs that fit on one multiprocessor side by side; 0 if not even one does."""
    if registers > 255 or shared > multiprocessor.shared_each:
        return 0
    threads = 32 * warps
    return min(
        multiprocessor.registers // (-(-registers // 8) * 8 * threads),
        multiprocessor.shared // (shared + _RESERVED),
        multiprocessor.threads // threads,
        multiprocessor.programs,
    )
