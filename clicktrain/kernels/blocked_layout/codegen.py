"""C text that transposes between ``[N, C, H, W]`` and ``[B, C, H, W, V]``, in tiles of V x V in registers.

The numbers of an image are seen as ``outer`` runs of ``columns`` contiguous ones: one run of C*H*W, or, with
channels last, H*W runs of C. A tile is V images times V columns: on either side V whole vectors, cache lines
where a vector is as wide as one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clicktrain.kernels.native import preamble


def source(dtype: torch.dtype, lanes: int) -> str:
    """The functions ``block`` and ``unblock`` for one number type and V, a power of two."""
    size = dtype.itemsize
    total = lanes * size
    types = f"""
typedef int{8 * size}_t ivec __attribute__((vector_size({total})));
/* Images begin anywhere: no alignment beyond a number's. */
typedef number uvec __attribute__((vector_size({total}), aligned({size}), may_alias));
"""
    block = {
        "name": "block",
        "plain_type": "const number",
        "blocked_type": "number",
        "tile": "tile(p, image, q, by_column * LANES, rows, LANES);",
        "number": "q[i] = i < rows ? p[i * image] : 0;",
    }
    unblock = {
        "name": "unblock",
        "plain_type": "number",
        "blocked_type": "const number",
        "tile": "tile(q, by_column * LANES, p, image, LANES, rows);",
        "number": "if (i < rows) p[i * image] = q[i];",
    }
    loops = _fill(_LOOPS, block) + _fill(_LOOPS, unblock)
    return preamble(dtype, lanes) + types + _MACROS + _tile(lanes, size) + loops


def _tile(lanes: int, size: int) -> str:
    """A square: ``rows`` vectors are read, zeros for the others, and ``out`` of its transpose written."""
    lines = [
        "",
        "INLINE void tile(const number *from, int64_t from_row, number *to, int64_t to_row,",
        "                 const int64_t rows, const int64_t out) {",
        "  const uvec zero = {0};",
        f"  uvec {', '.join(f'r{i}' for i in range(lanes))};",
        *(f"  r{i} = {i} < rows ? *(const uvec *)(from + {i} * from_row) : zero;" for i in range(lanes)),
        *_transpose(lanes, size),
        *(f"  if ({i} < out) *(uvec *)(to + {i} * to_row) = r{i};" for i in range(lanes)),
        "}",
    ]
    return "\n".join(lines)


def _transpose(lanes: int, size: int) -> Iterator[str]:
    """Rounds over pairs of registers that are ``step`` apart; each exchanges one bit of row and column.

    Within 128 bits pairs are interleaved, which is one instruction a register for numbers of any size: column
    bits rotate there, and after the last of these rounds all are in their places. Larger steps swap the
    off-diagonal quarters of a square.
    """
    near = min(16 // size, lanes)
    half = near // 2
    step = lanes // 2
    while step:
        if step < near:
            first = [i for start in range(0, lanes, near) for i in range(start, start + half)]
            low = [i for j in first for i in (j, lanes + j)]
            high = [i + half for i in low]
        else:
            low = [lanes + j - step if j & step else j for j in range(lanes)]
            high = [i + step for i in low]
        for i in range(lanes):
            if not i & step:
                a, b = f"r{i}", f"r{i + step}"
                mixed = (f"MIX(a, b, {', '.join(map(str, indices))})" for indices in (low, high))
                yield f"  {{ const uvec a = {a}, b = {b}; {a} = {next(mixed)}; {b} = {next(mixed)}; }}"
        step //= 2


def _fill(text: str, words: dict[str, str]) -> str:
    for name, word in words.items():
        text = text.replace(f"@{name}@", word)
    return text


_MACROS = """
#define INLINE static inline __attribute__((always_inline))
#if __has_builtin(__builtin_shufflevector)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#ifdef _OPENMP
#define PARTS _Pragma("omp parallel for num_threads(threads) if (threads > 1) schedule(static)")
#else
#define PARTS
#endif
/* Runs and columns of one part: with channels last, lines of 16 runs are used up while they are near. */
#define RUNS 16
#define COLUMNS (32 * LANES)
"""

_LOOPS = """
/* Runs [o0, o1) by columns [c0, c1) of one block. Number (o, c) of its first image is at
   plain + o * columns + c, vector (o, c) at blocked + (o * by_run + c * by_column) * LANES. */
INLINE void @name@_part(@plain_type@ *plain, @blocked_type@ *blocked, int64_t image, int64_t columns,
                        int64_t by_run, int64_t by_column, int64_t o0, int64_t o1, int64_t c0, int64_t c1,
                        const int64_t rows) {
  int64_t c = c0;
  for (; c + LANES <= c1; c += LANES)
    for (int64_t o = o0; o < o1; ++o) {
      @plain_type@ *p = plain + o * columns + c;
      @blocked_type@ *q = blocked + (o * by_run + c * by_column) * LANES;
      @tile@
    }
  for (int64_t o = o0; o < o1; ++o)
    for (int64_t k = c; k < c1; ++k) {
      @plain_type@ *p = plain + o * columns + k;
      @blocked_type@ *q = blocked + (o * by_run + k * by_column) * LANES;
      for (int64_t i = 0; i < LANES; ++i) @number@
    }
}
int @name@(@plain_type@ *plain, @blocked_type@ *blocked, int64_t n, int64_t blocks, int64_t outer,
           int64_t columns, int64_t by_run, int64_t by_column, int64_t threads) {
  const int64_t image = outer * columns, segments = (columns + COLUMNS - 1) / COLUMNS;
  const int64_t parts = (outer + RUNS - 1) / RUNS * segments;
  PARTS
  for (int64_t item = 0; item < blocks * parts; ++item) {
    const int64_t b = item / parts, o = item % parts / segments * RUNS, c = item % segments * COLUMNS;
    const int64_t o1 = min64(o + RUNS, outer), c1 = min64(c + COLUMNS, columns);
    const int64_t rows = min64(n - b * LANES, LANES);
    @plain_type@ *p = plain + b * LANES * image;
    @blocked_type@ *q = blocked + b * LANES * image;
    /* A full block has code of its own in which the number of images is known. */
    if (rows == LANES) @name@_part(p, q, image, columns, by_run, by_column, o, o1, c, c1, LANES);
    else @name@_part(p, q, image, columns, by_run, by_column, o, o1, c, c1, rows);
  }
  return 0;
}
"""
