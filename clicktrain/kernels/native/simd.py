"""The SIMD units that kernels are generated for: the processor's, or those that the environment asks for.

Compilers lower wide vectors to narrow instructions, and the generated text has plain C where an instruction
is missing. So kernels of every width run on every processor, and tests need no machine that has it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace

from clicktrain.errors import UserError

_VECTOR_BYTES = (("__AVX512F__", 64), ("__AVX__", 32))
_REGISTERS = {4: 32, 8: 16, 16: 32}
"""Vector registers by float32 lanes: those of NEON, AVX2 and AVX-512."""
_PAIRS = {"0": False, "1": True}


@dataclass(frozen=True, slots=True)
class Simd:
    """What generators, and the rules that choose among kernels, ask of a processor.

    ``pairs``: whether an instruction multiplies pairs of bfloat16 numbers in whole vectors.
    """

    vector_bytes: int
    registers: int
    pairs: bool


def native_simd(isa: Collection[str]) -> Simd:
    """The units of a processor, from macros of its instructions such as ``__AVX2__``."""
    vector_bytes = next((size for macro, size in _VECTOR_BYTES if macro in isa), 16)
    registers = 32 if "__AVX512F__" in isa or "__ARM_NEON" in isa else 16
    return Simd(vector_bytes, registers, "__AVX512BF16__" in isa and vector_bytes == 64)


def requested_simd(native: Simd) -> Simd:
    """What the environment asks for, ``native`` where it asks for nothing.

    ``CLICKTRAIN_LANES`` is the number of float32 lanes: 4, 8 or 16, with as many registers as NEON, AVX2 or
    AVX-512 have. ``CLICKTRAIN_PAIRS`` says whether kernels may multiply pairs of bfloat16 numbers: 0 or 1.
    What the processor lacks is emulated: the same results, slowly. Both are for tests.

    Raises:
        UserError: any other value.
    """
    lanes = os.environ.get("CLICKTRAIN_LANES", "")
    if lanes and lanes not in map(str, _REGISTERS):
        raise UserError(
            f"CLICKTRAIN_LANES is {lanes!r}: set it to 4, 8 or 16 float32 lanes, or leave it unset"
        )
    pairs = os.environ.get("CLICKTRAIN_PAIRS", "")
    if pairs and pairs not in _PAIRS:
        raise UserError(f"CLICKTRAIN_PAIRS is {pairs!r}: set it to 0 or 1, or leave it unset")
    simd = native
    if lanes and 4 * int(lanes) != native.vector_bytes:
        simd = Simd(4 * int(lanes), _REGISTERS[int(lanes)], False)
    return replace(simd, pairs=_PAIRS[pairs]) if pairs else simd
