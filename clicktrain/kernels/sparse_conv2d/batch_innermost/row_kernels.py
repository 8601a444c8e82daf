"""Kernels of rows that share nothing, by multiply-adds outside the tensor cores: see `block_kernels`."""

from __future__ import annotations

from typing import Any

try:
    import triton.language as tl
except ImportError:  # nothing is compiled here then
    tl: Any = None  # type: ignore[no-redef]


def convolve_rows(
    x: tl.tensor,
    v: tl.tensor,
    offsets: tl.tensor,
    taps: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    longest: tl.tensor,
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
    WIDE: tl.constexpr,
    BIG: tl.constexpr,
    EVEN: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """As `convolve_blocks`, each row with kept positions of its own.

    ``starts`` [rows + 1] says which of ``offsets``, ``taps`` and v [nnz] are a row's; ``longest`` [blocks]
    how many the longest row of a program has. Rows side by side go through the sources together, so that what
    one read is in L1 for the next.
    """
    accumulate = tl.float64 if WIDE else tl.float32
    pid = tl.program_id(0)
    block = pid % blocks
    tile = pid // blocks
    chunks = (n + BN - 1) // BN
    column = tl.arange(0, BQ)
    image = (tile % chunks) * BN + column % BN
    if BQ == BN:
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
    r = tl.load(rows + block * M + m)
    live = r >= 0
    first = tl.load(starts + r, mask=live, other=0)
    count = tl.load(starts + r + 1, mask=live, other=0) - first
    sum_of = tl.full([M, BQ], 0.0, accumulate)
    for k in range(tl.load(longest + block)):
        own = k < count
        offset = tl.load(offsets + first + k, mask=own, other=0)
        tap = tl.load(taps + first + k, mask=own, other=0)
        value = tl.load(v + first + k, mask=own, other=0.0).to(accumulate)
        down = (tap << 16) >> 16
        across = tap >> 16
        row = offset.to(tl.int64) * n if BIG else offset * n
        if BQ == BN:
            h = h0 + down
            w = w0 + across
            there = (own & (h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
        else:
            h = h0[None, :] + down[:, None]
            w = w0[None, :] + across[:, None]
            there = own[:, None] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        if not EVEN:
            there = there & inside[None, :]
        xs = tl.load(x + (row[:, None] + at[None, :]), mask=there, other=0.0).to(accumulate)
        sum_of += value[:, None] * xs
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
        sum_of = tl.where(sum_of < 0.0, 0.0, sum_of)
    tl.store(y + to, sum_of.to(y.dtype.element_ty), mask=written)


def weight_gradient_rows(
    x: tl.tensor,
    gy: tl.tensor,
    offsets: tl.tensor,
    taps: tl.tensor,
    tiles_of: tl.tensor,
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
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
    BIG: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """partial[split, k] = sum of gy[row(k), q] * x[position(k, q)] over a split's columns q.

    A program has up to BK values of one row.

    ``tiles_of`` [programs, 3]: row, first value, number of values; ``total`` is the number of all values.
    """
    accumulate = tl.float64 if WIDE else tl.float32
    t = tl.program_id(0)
    split = tl.program_id(1)
    r = tl.load(tiles_of + 3 * t)
    first = tl.load(tiles_of + 3 * t + 1)
    count = tl.load(tiles_of + 3 * t + 2)
    kk = tl.arange(0, BK)
    own = kk < count
    column = tl.arange(0, BQ)
    offset = tl.load(offsets + first + kk, mask=own, other=0)
    tap = tl.load(taps + first + kk, mask=own, other=0)
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
    sum_of = tl.full([BK, BQ], 0.0, accumulate)
    for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
        image = (tile % chunks) * BN + column % BN
        if BQ == BN:
            position = tile // chunks
            h0 = position // grid_columns * step_rows + base_rows
            w0 = position % grid_columns * step_columns + base_columns
            h = h0 + down
            w = w0 + across
            there = (own & (h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
            inside = image < n
        else:
            position = (tile // chunks) * (BQ // BN) + column // BN
            h0 = position // grid_columns * step_rows + base_rows
            w0 = position % grid_columns * step_columns + base_columns
            h = h0[None, :] + down[:, None]
            w = w0[None, :] + across[:, None]
            there = own[:, None] & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            inside = (image < n) & (position < positions)
        place = h0 * width + w0
        if BIG:
            at = place.to(tl.int64) * n + image
            from_gradient = position.to(tl.int64) * n + image
        else:
            at = place * n + image
            from_gradient = position * n + image
        if not EVEN:
            there = there & inside[None, :]
        g = tl.load(gy + (gradient_row + from_gradient), mask=inside, other=0.0).to(accumulate)
        xs = tl.load(x + (row[:, None] + at[None, :]), mask=there, other=0.0).to(accumulate)
        sum_of += xs * g[None, :]
    to = split.to(tl.int64) * total + first + kk
    tl.store(partial + to, tl.reduce(sum_of, 1, tl.standard._sum_combine), mask=own)
