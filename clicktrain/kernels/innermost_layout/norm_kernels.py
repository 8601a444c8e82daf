"""Batch norm in training with what stands around it, in Triton's language; see `norm_launch`.

Plain functions, as `clicktrain.kernels.sparse_conv2d.batch_innermost.block_kernels` has them and why. A
channel is one run of ``size`` numbers. A program has one channel and ``BLOCKS`` blocks of ``BLOCK`` numbers;
``chunks`` programs share a channel. Numbers by channel are float32, float64 with ``WIDE``.
"""

from __future__ import annotations

from typing import Any

try:
    import triton.language as tl
except ImportError:  # nothing is compiled here then
    tl: Any = None  # type: ignore[no-redef]


def channel_statistics(
    x: tl.tensor,
    sums: tl.tensor,
    channels: tl.tensor,
    size: tl.tensor,
    chunks: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """sums[0, chunk, c] = the mean of a chunk, sums[1, chunk, c] = the squared deviations from it.

    Block by block, each joined to those before (Chan, Golub and LeVeque 1983): no squares of large numbers.
    """
    accumulate = tl.float64 if WIDE else tl.float32
    pid = tl.program_id(0)
    channel = pid // chunks
    chunk = pid % chunks
    count = tl.full([], 0.0, accumulate)
    mean = tl.full([], 0.0, accumulate)
    squares = tl.full([], 0.0, accumulate)
    for block in range(BLOCKS):
        at = (chunk * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        value = tl.load(x + channel.to(tl.int64) * size + at, mask=inside, other=0.0).to(accumulate)
        many = tl.reduce(inside.to(accumulate), 0, tl.standard._sum_combine)
        own = tl.reduce(value, 0, tl.standard._sum_combine) / tl.maximum(many, 1.0)
        apart = tl.where(inside, value - own, 0.0)
        total = tl.maximum(count + many, 1.0)
        far = own - mean
        squares += tl.reduce(apart * apart, 0, tl.standard._sum_combine) + far * far * count * many / total
        mean += far * many / total
        count += many
    tl.store(sums + chunk * channels + channel, mean)
    tl.store(sums + (chunks + chunk) * channels + channel, squares)


def normalize(
    x: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    size: tl.tensor,
    chunks: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
) -> None:
    """y = act((x - mean) * scale + shift + residual); ``mean``, ``scale`` and ``shift`` by channel."""
    accumulate = tl.float64 if WIDE else tl.float32
    pid = tl.program_id(0)
    channel = pid // chunks
    chunk = pid % chunks
    middle = tl.load(mean + channel)
    factor = tl.load(scale + channel)
    offset = tl.load(shift + channel)
    for block in range(BLOCKS):
        at = (chunk * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        place = channel.to(tl.int64) * size + at
        value = tl.load(x + place, mask=inside, other=0.0).to(accumulate)
        value = (value - middle) * factor + offset
        if RESIDUAL:
            value = value + tl.load(residual + place, mask=inside, other=0.0).to(accumulate)
        if RELU:
            # Not maximum, which loses a NaN.
            value = tl.where(value < 0.0, 0.0, value)
        tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


def gradient_sums(
    gy: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    sums: tl.tensor,
    channels: tl.tensor,
    size: tl.tensor,
    chunks: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    RELU: tl.constexpr,
    BY_RESULT: tl.constexpr,
) -> None:
    """sums[0, chunk, c] = sum of g, sums[1, chunk, c] = sum of g * (x - mean); g is gy where act let it by.

    Whether ReLU did is read from its result (``BY_RESULT``), or computed again from ``x``, which is read
    anyway.
    """
    accumulate = tl.float64 if WIDE else tl.float32
    pid = tl.program_id(0)
    channel = pid // chunks
    chunk = pid % chunks
    middle = tl.load(mean + channel)
    factor = tl.load(scale + channel)
    offset = tl.load(shift + channel)
    plain = tl.full([BLOCK], 0.0, accumulate)
    along = tl.full([BLOCK], 0.0, accumulate)
    for block in range(BLOCKS):
        at = (chunk * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        place = channel.to(tl.int64) * size + at
        g = tl.load(gy + place, mask=inside, other=0.0).to(accumulate)
        apart = tl.load(x + place, mask=inside, other=0.0).to(accumulate) - middle
        if RELU:
            if BY_RESULT:
                result = tl.load(y + place, mask=inside, other=0.0).to(accumulate)
            else:
                result = apart * factor + offset
            g = tl.where(result <= 0.0, 0.0, g)
        plain += g
        along += tl.where(inside, g * apart, 0.0)
    tl.store(sums + chunk * channels + channel, tl.reduce(plain, 0, tl.standard._sum_combine))
    tl.store(sums + (chunks + chunk) * channels + channel, tl.reduce(along, 0, tl.standard._sum_combine))


def input_gradient(
    gy: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    slope: tl.tensor,
    level: tl.tensor,
    gx: tl.tensor,
    gr: tl.tensor,
    size: tl.tensor,
    chunks: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    RELU: tl.constexpr,
    BY_RESULT: tl.constexpr,
    RESIDUAL: tl.constexpr,
) -> None:
    """gx = g * scale - (x - mean) * slope - level, and gr = g if that is wanted; g as in `gradient_sums`."""
    accumulate = tl.float64 if WIDE else tl.float32
    pid = tl.program_id(0)
    channel = pid // chunks
    chunk = pid % chunks
    middle = tl.load(mean + channel)
    factor = tl.load(scale + channel)
    offset = tl.load(shift + channel)
    tilt = tl.load(slope + channel)
    ground = tl.load(level + channel)
    for block in range(BLOCKS):
        at = (chunk * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        place = channel.to(tl.int64) * size + at
        g = tl.load(gy + place, mask=inside, other=0.0).to(accumulate)
        apart = tl.load(x + place, mask=inside, other=0.0).to(accumulate) - middle
        if RELU:
            if BY_RESULT:
                result = tl.load(y + place, mask=inside, other=0.0).to(accumulate)
            else:
                result = apart * factor + offset
            g = tl.where(result <= 0.0, 0.0, g)
        if RESIDUAL:
            tl.store(gr + place, g.to(gr.dtype.element_ty), mask=inside)
        tl.store(gx + place, (g * factor - apart * tilt - ground).to(gx.dtype.element_ty), mask=inside)
