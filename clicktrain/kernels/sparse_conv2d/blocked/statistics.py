"""Mean and variance of each filter's results, summed up by the forward kernels as they store a tile.

A thread sums ``x - c`` and its square, where c is the first result that it computed for the filter: sums of
plain squares would lose the variance where the mean is far from zero. If c is no usual number but d away from
the mean of k numbers, the variance is at least ``d * d / k``, so what rounding takes of it stays bounded. A
tile is summed by itself, a run of tiles in the number type, then all in double. Lanes stay apart until the
end: what fills up the last block of images is dropped there, even if it is NaN. Threads are combined in their
order, so that results repeat bit for bit.
"""

from __future__ import annotations

import torch

from clicktrain.kernels.sparse_conv2d.blocked.template import Code

TILE_PARAMETERS = ", vec *restrict moments, real *restrict centres, int fresh"
TILE_ARGUMENTS = ", moments, centres, fresh"


def moment_vectors(filters: int, dtype: torch.dtype) -> int:
    """Vectors that each thread needs, behind the scratch memory of all threads."""
    return 3 * filters + 16 // dtype.itemsize * filters + 1


def support(dtype: torch.dtype) -> str:
    """The functions that add up and combine sums."""
    return f"#define MOMENTS (3 * RESULTS + {16 // dtype.itemsize} * RESULTS + 1)\n" + _SUPPORT


def open_run(code: Code, entries: str, sums: bool) -> None:
    """Begin ``run`` of a kernel whose entries are of that type; with ``sums`` it also takes statistics."""
    results, images = ("real *mean, real *var, ", "int64_t n, ") if sums else ("", "")
    code(
        "int run(const stored *src, stored *dst, const weight *values, const real *bias, "
        f"const int32_t *rows, const {entries} *entries, {results}vec *scratch, {images}int64_t blocks, "
        "int64_t stream, int64_t threads) {"
    )


def open_sums(code: Code) -> None:
    """Begin a thread's sums."""
    code("vec *moments = scratch + all * SCRATCH + me * MOMENTS;")
    code("real *centres = (real *)(moments + 2 * RESULTS);")
    code("double *totals = (double *)(moments + 3 * RESULTS), seen[2] = {0};")
    code("memset(totals, 0, 2 * LANES * RESULTS * sizeof(double));")
    code("int64_t held = 0;")
    code("int fresh = 1;")


def close_region(code: Code, positions: str) -> None:
    """After a region of so many positions: add up where sums get long, and where the last block begins."""
    code(f"held += {positions};")
    code("if (held >= PIECE || item + 1 == last || item + 1 == (blocks - 1) * REGION_ROWS * REGION_COLS) {")
    code("add_up(moments, totals, b == blocks - 1 ? n - b * LANES : LANES);")
    code("seen[b == blocks - 1] += held;")
    code("held = 0;")
    code("}")


def close_sums(code: Code) -> None:
    """After a thread's last region: all threads' sums become mean and variance."""
    code("memcpy(totals + 2 * LANES * RESULTS, seen, sizeof seen);")
    code("#ifdef _OPENMP")
    code("#pragma omp barrier")
    code("#endif")
    code("combine(scratch + all * SCRATCH, all, me, blocks, n, mean, var);")


def open_tile(code: Code, number: str, first: str) -> None:
    """Find the sums ``m`` of a filter and where they begin, ``c``; ``first`` is the tile's first result.

    Its lane 0 is an image also in the last block.
    """
    code(f"vec *m = moments + 2 * ({number});")
    code(f"if (fresh) {{ centres[{number}] = {first}[0]; m[0] = m[1] = (vec){{0}}; }}")
    code(f"const vec c = splat(centres[{number}]);")


def add_tile(code: Code, number: str, sums: list[str]) -> None:
    """Add a whole tile to the sums of its filter."""
    code("{")
    open_tile(code, number, sums[0])
    code("vec d, s0 = {0}, q0 = {0}, s1 = {0}, q1 = {0};")
    for k, one in enumerate(sums):
        code(f"d = {one} - c; s{k % 2} += d; q{k % 2} += d * d;")
    code("m[0] += s0 + s1; m[1] += q0 + q1;")
    code("}")


_SUPPORT = """
// Positions of which a lane's sums are held in `real` before they go over to double.
#define PIECE 256
// Of each thread: each filter's sums of what lies above its centre and of its square; the centres; the sums
// in double, lane by lane; positions seen before the last block of images, and in it.
static __attribute__((noinline)) void add_up(vec *restrict moments, double *restrict totals, int64_t lanes) {
  for (long f = 0; f < RESULTS; ++f, moments += 2, totals += 2 * LANES) {
    real s[2 * LANES];
    memcpy(s, moments, sizeof s);
    if (lanes == LANES) for (int l = 0; l < 2 * LANES; ++l) totals[l] += s[l];
    else for (int l = 0; l < lanes; ++l) { totals[l] += s[l]; totals[LANES + l] += s[LANES + l]; }
    moments[0] = moments[1] = (vec){0};
  }
}
static __attribute__((noinline)) void combine(const vec *of, int64_t all, int64_t me, int64_t blocks,
                                              int64_t n, real *restrict mean, real *restrict var) {
  const int64_t tail = n - (blocks - 1) * LANES;
  const double count = (double)n * (DST_H * DST_W);
  for (long f = RESULTS * me / all; f < RESULTS * (me + 1) / all; ++f) {
    double sum = 0, square = 0, centre = 0;
    for (int second = 0; second < 2; ++second) {
      for (int64_t t = 0; t < all; ++t) {
        const vec *moments = of + t * MOMENTS;
        const double *totals = (const double *)(moments + 3 * RESULTS), *seen = totals + 2 * LANES * RESULTS;
        const double *s = totals + 2 * LANES * f, *q = s + LANES;
        const double c = ((const real *)(moments + 2 * RESULTS))[f], d = c - centre;
        for (int l = 0; l < LANES; ++l) {
          const double k = seen[0] + (l < tail ? seen[1] : 0);
          if (k == 0) continue;
          if (second) square += q[l] + d * (2 * s[l] + k * d);
          else sum += s[l] + k * c;
        }
      }
      centre = sum / count;
    }
    mean[f] = centre;
    var[f] = square < 0 ? 0 : square / count;
  }
}
"""
