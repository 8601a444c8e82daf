"""Kernels of rows that share positions, on tensor cores.

They are plain functions in Triton's language; `launch` compiles or interprets them.

They are not decorated, so that one process can compile a kernel for a GPU that it does not have, interpret it
on the CPU, and be read where Triton is not installed. For that reason they call no function of their own, and
none of Triton's library: ``tl.sum`` is compiled or interpreted for the whole process.

x is ``[sources, H, W, N]``, y ``[rows, H', W', N]``, both contiguous. A *tile* of columns is ``BQ / BN``
positions of a pass's grid times ``BN`` images. A *block* is M rows of the result that share one list of kept
positions; ``offsets`` are flat places of rows of N numbers in the source, ``taps`` the pair of offsets that
says whether a position lies inside the image: rows in the low half, columns in the high half. ``LIFTED`` is
for the interpreter, which multiplies the bits of bfloat16 numbers: it widens them first.
"""

from __future__ import annotations

from typing import Any

try:
    import triton.language as tl
except ImportError:  # nothing is compiled here then
    tl: Any = None  # type: ignore[no-redef]


def convolve_blocks(
    x: tl.tensor,
    v: tl.tensor,
    offsets: tl.tensor,
    taps: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    residual: tl.tensor,
    sums: tl.tensor,
    n: tl.tensor,
    positions: tl.tensor,
    blocks: tl.tensor,
    row_count: tl.tensor,
    grid_columns: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    step_rows: tl.tensor,
    step_columns: tl.tensor,
    base_rows: tl.tensor,
    base_columns: tl.tensor,
    target_image: tl.tensor,
    target_width: tl.tensor,
    out_step_rows: tl.tensor,
    out_step_columns: tl.tensor,
    out_first_row: tl.tensor,
    out_first_column: tl.tensor,
    M: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFTED: tl.constexpr,
    WIDE: tl.constexpr,
    BIG: tl.constexpr,
    EVEN: tl.constexpr,
    CACHED: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """y[rows[b], q] = act(scale * sum_k v[b, :, k] * x[position(k, q)] + shift + residual), for all blocks b.

    v is [K / BK, M, BK], of x's dtype. ``sums`` [2, tiles, rows] takes the mean of each row's products in a
    tile, before scale and shift, and their squared deviations from it.
    """
    accumulate = tl.float64 if WIDE else tl.float32
    pid = tl.program_id(0)
    block = pid % blocks
    tile = pid // blocks
    chunks = (n + BN - 1) // BN
    column = tl.arange(0, BQ)
    image = (tile % chunks) * BN + column % BN
    if BQ == BN:  # one position: what lies outside the image does so for the whole row
        position = tile // chunks
        inside = image < n
    else:
        position = (tile // chunks) * (BQ // BN) + column // BN
        inside = (image < n) & (position < positions)
    i = position // grid_columns
    j = position % grid_columns
    h0 = i * step_rows + base_rows
    w0 = j * step_columns + base_columns
    place = h0 * width + w0
    at = place.to(tl.int64) * n + image if BIG else place * n + image
    m = tl.arange(0, M)
    kk = tl.arange(0, BK)
    first = tl.load(starts + block)
    last = tl.load(starts + block + 1)
    sum_of = tl.full([M, BQ], 0.0, accumulate)
    for k0 in range(first, last, BK):
        offset = tl.load(offsets + k0 + kk)
        tap = tl.load(taps + k0 + kk)
        down = (tap << 16) >> 16
        across = tap >> 16
        row = offset.to(tl.int64) * n if BIG else offset * n
        if BQ == BN:
            h = h0 + down
            w = w0 + across
            there = ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
        else:
            h = h0[None, :] + down[:, None]
            w = w0[None, :] + across[:, None]
            there = (h >= 0) & (h < height) & (w >= 0) & (w < width)
        if not EVEN:
            there = there & inside[None, :]
        if CACHED:
            xs = tl.load(x + (row[:, None] + at[None, :]), mask=there, other=0.0, cache_modifier=".ca")
        else:
            xs = tl.load(x + (row[:, None] + at[None, :]), mask=there, other=0.0)
        vs = tl.load(v + (k0 * M + m[:, None] * BK + kk[None, :]))
        if LIFTED:
            vs = vs.to(tl.float32)
            xs = xs.to(tl.float32)
        sum_of = tl.dot(vs, xs, sum_of, input_precision=PRECISION, out_dtype=accumulate)
    r = tl.load(rows + block * M + m)
    live = r >= 0
    if SUMS:
        counted = (live[:, None] & inside[None, :]).to(accumulate)
        many = tl.maximum(tl.reduce(counted, 1, tl.standard._sum_combine), 1.0)
        mean = tl.reduce(sum_of * counted, 1, tl.standard._sum_combine) / many
        apart = (sum_of - mean[:, None]) * counted
        tiles = tl.num_programs(0) // blocks
        tl.store(sums + tile * row_count + r, mean, mask=live)
        tl.store(
            sums + (tiles + tile) * row_count + r,
            tl.reduce(apart * apart, 1, tl.standard._sum_combine),
            mask=live,
        )
    if SCALE:
        sum_of = sum_of * tl.load(scale + r, mask=live, other=0.0)[:, None]
    if SHIFT:
        sum_of = sum_of + tl.load(shift + r, mask=live, other=0.0)[:, None]
    target = (i * out_step_rows + out_first_row) * target_width + j * out_step_columns + out_first_column
    if BIG:
        to = (r.to(tl.int64) * target_image * n)[:, None] + (target.to(tl.int64) * n + image)[None, :]
    else:
        to = (r * target_image * n)[:, None] + (target * n + image)[None, :]
    written = live[:, None] & inside[None, :]
    if RESIDUAL:
        sum_of = sum_of + tl.load(residual + to, mask=written, other=0.0).to(accumulate)
    if RELU:
        # Not maximum, which loses a NaN.
        sum_of = tl.where(sum_of < 0.0, 0.0, sum_of)
    tl.store(y + to, sum_of.to(y.dtype.element_ty), mask=written)


def weight_gradient_blocks(
    x: tl.tensor,
    gy: tl.tensor,
    offsets: tl.tensor,
    taps: tl.tensor,
    rows: tl.tensor,
    block_of: tl.tensor,
    partial: tl.tensor,
    n: tl.tensor,
    positions: tl.tensor,
    share: tl.tensor,
    total: tl.tensor,
    grid_columns: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    step_rows: tl.tensor,
    step_columns: tl.tensor,
    base_rows: tl.tensor,
    base_columns: tl.tensor,
    M: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    LIFTED: tl.constexpr,
    WIDE: tl.constexpr,
    BIG: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """partial[split, t] = gy[rows[block_of[t]], q] * x[position(k, q)], summed over a split's columns q.

    ``share`` tiles of columns belong to a split; ``total`` is the number of partial sums of one split, which
    are [K / BK, M, BK].
    """
    accumulate = tl.float64 if WIDE else tl.float32
    t = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.arange(0, M)
    kk = tl.arange(0, BK)
    column = tl.arange(0, BQ)
    r = tl.load(rows + tl.load(block_of + t) * M + m)
    live = r >= 0
    offset = tl.load(offsets + t * BK + kk)
    tap = tl.load(taps + t * BK + kk)
    down = (tap << 16) >> 16
    across = tap >> 16
    if BIG:
        row = offset.to(tl.int64) * n
        gradient_row = r.to(tl.int64) * positions * n
    else:
        row = offset * n
        gradient_row = r * positions * n
    chunks = (n + BN - 1) // BN
    tiles = chunks * ((positions + (BQ // BN) - 1) // (BQ // BN))
    sum_of = tl.full([M, BK], 0.0, accumulate)
    for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
        image = (tile % chunks) * BN + column % BN
        if BQ == BN:
            position = tile // chunks
            h0 = position // grid_columns * step_rows + base_rows
            w0 = position % grid_columns * step_columns + base_columns
            h = h0 + down
            w = w0 + across
            there = ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
            inside = image < n
        else:
            position = (tile // chunks) * (BQ // BN) + column // BN
            h0 = position // grid_columns * step_rows + base_rows
            w0 = position % grid_columns * step_columns + base_columns
            h = h0[None, :] + down[:, None]
            w = w0[None, :] + across[:, None]
            there = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            inside = (image < n) & (position < positions)
        place = h0 * width + w0
        if BIG:
            at = place.to(tl.int64) * n + image
            from_gradient = position.to(tl.int64) * n + image
        else:
            at = place * n + image
            from_gradient = position * n + image
        given = live[:, None]
        if not EVEN:
            there = there & inside[None, :]
            given = given & inside[None, :]
        g = tl.load(gy + (gradient_row[:, None] + from_gradient[None, :]), mask=given, other=0.0)
        xs = tl.load(x + (row[:, None] + at[None, :]), mask=there, other=0.0)
        if LIFTED:
            g = g.to(tl.float32)
            xs = xs.to(tl.float32)
        sum_of = tl.dot(g, tl.trans(xs), sum_of, input_precision=PRECISION, out_dtype=accumulate)
    to = split.to(tl.int64) * total + t.to(tl.int64) * (M * BK)
    tl.store(partial + (to + m[:, None] * BK + kk[None, :]), sum_of)
