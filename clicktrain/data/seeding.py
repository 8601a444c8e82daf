"""Random streams that depend on what they are for, and on nothing that happened before."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(purpose: str, *key: int) -> torch.Generator:
    """Make a CPU generator whose stream is fixed by ``purpose`` and ``key`` alone.

    Streams of different purposes or keys are unrelated, so a batch can be drawn again, or skipped, without
    replaying the ones before it.

    Args:
        purpose: what the numbers are for, such as ``"order"`` or ``"mixup"``.
        key: any integers, usually (seed, epoch, batch index).

    Example:
        >>> torch.equal(
        ...     torch.rand(2, generator=seeded_generator("mixup", 0, 3)),
        ...     torch.rand(2, generator=seeded_generator("mixup", 0, 3)),
        ... )
        True
    """
    text = ":".join([purpose, *(str(int(part)) for part in key)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)  # manual_seed takes 63 bits
    return generator
