"""Mean and variance of each filter's results, summed up by the forward kernels as they store a tile.

A chunk of regions (`schedule`) sums ``x - c`` and its square, where c is the first result that it has for the
filter: sums of plain squares would lose the variance where the mean is far from zero. If c is no usual number
but d away from the mean of k numbers, the variance is at least ``d * d / k``, so what rounding takes of it
stays bounded. A tile is summed by itself, a run of tiles in the number type and lane by lane, then all in
double. What fills up the last block of images is dropped with its lanes, even if it is NaN. Chunks are
combined in their order, so that results repeat bit for bit, whichever thread took them.
"""

from __future__ import annotations

from clicktrain.kernels.sparse_conv2d.blocked.shared.schedule import CHUNKS
from clicktrain.kernels.sparse_conv2d.blocked.shared.template import Code

TILE_PARAMETERS = ", vec *restrict moments, real *restrict centres, int fresh"
TILE_ARGUMENTS = ", moments, centres, fresh"


def scratch_bytes(filters: int, threads: int, vector_bytes: int) -> int:
    """Memory behind the scratch memory of all threads: each one's running sums, and sums by chunk."""
    chunks = CHUNKS * threads if threads > 1 else 1
    return threads * 2 * filters * vector_bytes + chunks * 4 * filters * 8


def open_run(code: Code, entries: str, sums: bool) -> None:
    """Begin ``run`` of a kernel whose entries are of that type; with ``sums`` it also takes statistics."""
    results, images = ("real *mean, real *var, ", "int64_t n, ") if sums else ("", "")
    code(
        "int run(const stored *src, stored *dst, const weight *packed, const int32_t *order, "
        f"const real *bias, const int32_t *rows, const {entries} *entries, {results}vec *scratch, {images}"
        "int64_t count, int64_t places, int64_t room, int64_t blocks, int64_t stream, int64_t threads) {"
    )
    code("(void)places;")
    code("weight *ordered = (weight *)scratch;")
    code("const weight *values = order ? ordered : packed;")
    code("scratch += room;")


def open_sums(code: Code) -> None:
    """Before a thread's first region."""
    code("vec *moments = scratch + threads * SCRATCH + me * (2 * RESULTS);")
    code("double *all_totals = (double *)(scratch + threads * (SCRATCH + 2 * RESULTS));")
    code("double *totals = NULL;")
    code("real *centres = NULL;")
    code("int64_t held = 0;")
    code("int fresh = 1;")


def open_region(code: Code) -> None:
    """Before a region's first tile: a chunk that begins has sums of its own."""
    code("if (item == items * chunk / chunks) {")
    code("totals = all_totals + chunk * TOTALS;")
    code("memset(totals, 0, 3 * RESULTS * sizeof(double));")
    code("centres = (real *)(totals + 3 * RESULTS);")
    code("fresh = 1;")
    code("}")
    code("if (parts > 1) fresh = totals[2 * RESULTS + first] == 0;")


def close_region(code: Code, positions: str) -> None:
    """After a region of so many positions: add up where sums get long, and where the last block begins."""
    code(f"held += {positions};")
    code("if (parts > 1 || held >= PIECE || item + 1 == last")
    code("    || item + 1 == (blocks - 1) * REGION_ROWS * REGION_COLS) {")
    code("add_up(moments, totals, first, end, held, b == blocks - 1 ? n - b * LANES : LANES);")
    code("held = 0;")
    code("}")


def close_sums(code: Code) -> None:
    """After a thread's last region: the sums of all chunks become mean and variance."""
    code("#ifdef _OPENMP")
    code("#pragma omp barrier")
    code("#endif")
    code("combine(all_totals, chunks, me, all, n, mean, var);")


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


SUPPORT = """
// Positions of which a lane's sums are held in `real` before they go over to double.
#define PIECE 256
// Of each chunk: every filter's sum of what lies above its centre, and of the square of it; how many numbers
// these are sums of; the centre, which is `real`.
#define TOTALS (4 * RESULTS)
static __attribute__((noinline)) void add_up(vec *restrict moments, double *restrict totals, long first,
                                             long end, int64_t positions, int64_t lanes) {
  for (long f = first; f < end; ++f) {
    real s[2 * LANES];
    double sum = 0, square = 0;
    memcpy(s, moments + 2 * f, sizeof s);
    for (int l = 0; l < lanes; ++l) { sum += s[l]; square += s[LANES + l]; }
    totals[f] += sum;
    totals[RESULTS + f] += square;
    totals[2 * RESULTS + f] += (double)positions * lanes;
    moments[2 * f] = moments[2 * f + 1] = (vec){0};
  }
}
static __attribute__((noinline)) void combine(const double *of, int64_t chunks, int64_t me, int64_t all,
                                              int64_t n, real *restrict mean, real *restrict var) {
  const double count = (double)n * (DST_H * DST_W);
  for (long f = RESULTS * me / all; f < RESULTS * (me + 1) / all; ++f) {
    double sum = 0, square = 0, centre = 0;
    for (int second = 0; second < 2; ++second) {
      const double *totals = of;
      for (int64_t t = 0; t < chunks; ++t, totals += TOTALS) {
        const double k = totals[2 * RESULTS + f];
        if (k == 0) continue;
        const double c = ((const real *)(totals + 3 * RESULTS))[f], d = c - centre;
        if (second) square += totals[RESULTS + f] + d * (2 * totals[f] + k * d);
        else sum += totals[f] + k * c;
      }
      centre = sum / count;
    }
    mean[f] = centre;
    var[f] = square < 0 ? 0 : square / count;
  }
}
"""
