"""Conversions to and from the batch-blocked layout against the slow ones written with torch."""

from __future__ import annotations

import pytest
import slow_layout as layout
import torch

from clicktrain.errors import UserError
from clicktrain.kernels.blocked_layout import block_batch, ops, unblock_batch
from clicktrain.kernels.native import STORED_TYPES, toolchain

TOOLS = toolchain()
OPERATORS = torch.ops.clicktrain
pytestmark = pytest.mark.skipif(TOOLS is None, reason="there is no C compiler")
LANES = {dtype: TOOLS.lanes(dtype) if TOOLS else 1 for dtype in STORED_TYPES}
# Images, channels, height, width: parts of tiles in every direction, several parts of runs and of columns.
SHAPES = [
    (1, 1, 1, 1),
    (5, 3, 5, 7),
    (16, 16, 4, 4),
    (20, 17, 3, 5),
    (33, 3, 9, 19),
    (32, 1, 1, 1),
    (16, 600, 1, 2),
]


@pytest.mark.parametrize("dtype", list(LANES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, c, h, w = shape
    x = torch.randn(shape, dtype=dtype)
    wide = torch.randn(n, c, h, w + 2, dtype=dtype)
    for images in (x, x.contiguous(memory_format=torch.channels_last), wide[..., 1:-1], x.transpose(2, 3)):
        expected = layout.block(images, LANES[dtype])
        # What is not written would show, and the filling has to be written too.
        blocked = torch.full_like(expected, float("nan"))
        ops.block(images, LANES[dtype], out=blocked)
        assert torch.equal(blocked, expected)
        assert torch.equal(block_batch(images, LANES[dtype]), expected)
        back = torch.full(images.shape, float("nan"), dtype=dtype)
        ops.unblock(blocked, n, out=back)
        assert torch.equal(back, images)
        assert torch.equal(unblock_batch(blocked, n), images)
        assert unblock_batch(blocked, n).is_contiguous()


@pytest.mark.parametrize(
    ("lanes", "dtype"),
    [*((lanes, torch.float32) for lanes in (1, 2, 4)), *((lanes, torch.bfloat16) for lanes in (2, 4, 16))],
    ids=str,
)
def test_lanes_other_than_the_machines(lanes: int, dtype: torch.dtype) -> None:
    x = torch.randn(19, 5, 3, 3, dtype=dtype)
    assert torch.equal(block_batch(x, lanes), layout.block(x, lanes))
    assert torch.equal(unblock_batch(block_batch(x, lanes), 19), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_that_begin_anywhere(dtype: torch.dtype) -> None:
    x = torch.randn(1 + 18 * 45, dtype=dtype)[1:].view(18, 5, 3, 3)
    assert torch.equal(block_batch(x, 8), layout.block(x, 8))
    blocked = torch.zeros(1 + 3 * 45 * 8, dtype=dtype)[1:].view(3, 5, 3, 3, 8).copy_(layout.block(x, 8))
    assert torch.equal(unblock_batch(blocked, 18), x)


def test_gradients() -> None:
    x = torch.randn(5, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block_batch(x, 4), (x,))
    # The filling of the result of `block_batch` is a constant: a gradient there goes nowhere.
    (g,) = torch.autograd.grad(block_batch(x, 4).sum(), x)
    assert torch.equal(g, torch.ones_like(x))
    blocked = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unblock_batch(x, 5), (blocked,))
    # ... and that of the input of `unblock_batch` is zero in the filling.
    (g,) = torch.autograd.grad(unblock_batch(blocked, 5).sum(), blocked)
    assert torch.equal(g, layout.block(torch.ones_like(x), 4))


def test_declared_as_computed() -> None:
    torch.library.opcheck(OPERATORS.block_batch.default, (torch.randn(5, 3, 4, 3, requires_grad=True), 8))
    torch.library.opcheck(
        OPERATORS.block_batch.default,
        (torch.randn(9, 3, 4, 3).to(memory_format=torch.channels_last), 8),
    )
    torch.library.opcheck(
        OPERATORS.unblock_batch.default, (torch.randn(2, 3, 4, 3, 8, requires_grad=True), 13)
    )
    small = torch.randn(5, 3, 4, 3, dtype=torch.bfloat16, requires_grad=True)
    torch.library.opcheck(OPERATORS.block_batch.default, (small, 8))


def test_threads_agree() -> None:
    x = torch.randn(37, 19, 6, 7)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for images in (x, x.contiguous(memory_format=torch.channels_last)):
                assert torch.equal(block_batch(images, 16), layout.block(x, 16))
            assert torch.equal(unblock_batch(layout.block(x, 16), 37), x)
    finally:
        torch.set_num_threads(before)


def test_refusals() -> None:
    with pytest.raises(UserError, match="float16"):
        block_batch(torch.zeros(1, 1, 1, 1, dtype=torch.float16), 8)
    with pytest.raises(UserError, match="power of two"):
        block_batch(torch.zeros(1, 1, 1, 1), 6)
    with pytest.raises(UserError, match="3 blocks, not 2"):
        unblock_batch(torch.zeros(2, 1, 1, 1, 8), 17)
    with pytest.raises(UserError, match=r"\[N, C, H, W\]"):
        block_batch(torch.zeros(3, 3), 8)
    assert block_batch(torch.zeros(0, 3, 2, 2), 8).shape == (0, 3, 2, 2, 8)
