from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from image_files import encode, pixels
from PIL import Image

from clicktrain.data.decode import decode_all, decode_image, fit, to_pixels
from clicktrain.data.image_files import read_header
from clicktrain.errors import UserError


class Bytes:
    """Encoded images that are given."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index]

    def name(self, index: int) -> str:
        return f"file {index}"


def test_png_pixels_come_back_exactly() -> None:
    array = pixels(0, (5, 9))
    assert read_header(encode(array), "x").size == (5, 9)
    decoded = to_pixels(decode_image(encode(array), "x", 3))
    assert decoded.dtype == torch.uint8
    assert torch.equal(decoded, torch.from_numpy(array.copy()).permute(2, 0, 1))


def test_threads_give_the_order_that_was_asked_for() -> None:
    files = [encode(pixels(seed)) for seed in range(200)]
    indices = list(range(199, -1, -1))
    together = decode_all(Bytes(files), indices, 3, (8, 8), resize=False, threads=3)
    for row, index in enumerate(indices):
        assert np.array_equal(together[row].permute(1, 2, 0).numpy(), pixels(index))


def test_other_color_modes_become_rgb_or_gray() -> None:
    gray = pixels(1, channels=1)
    assert torch.equal(to_pixels(decode_image(encode(gray), "x", 1)), torch.from_numpy(gray.copy())[None])
    assert torch.equal(
        to_pixels(decode_image(encode(gray), "x", 3)), torch.from_numpy(gray.copy()).expand(3, 8, 8)
    )
    transparent = np.dstack([pixels(2), np.full((8, 8), 7, np.uint8)])
    assert np.array_equal(to_pixels(decode_image(encode(transparent), "x", 3)).permute(1, 2, 0), pixels(2))
    buffer = io.BytesIO()
    Image.fromarray(pixels(3)).convert("CMYK").save(buffer, "JPEG")
    assert to_pixels(decode_image(buffer.getvalue(), "x", 3)).shape == (3, 8, 8)
    buffer = io.BytesIO()
    Image.fromarray(pixels(3)).convert("P").save(buffer, "PNG", transparency=b"\x01\x02")
    assert to_pixels(decode_image(buffer.getvalue(), "x", 3)).shape == (3, 8, 8)


def test_sixteen_bit_gray_is_scaled() -> None:
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    decoded = to_pixels(decode_image(encode(deep), "x", 1))
    assert decoded[0].tolist() == [[0, 1, 1], [128, 254, 255]]
    assert read_header(encode(deep), "x").gray


def test_a_color_image_among_gray_ones_is_an_error() -> None:
    with pytest.raises(UserError, match=r"photo\.png is in color"):
        decode_image(encode(pixels(0)), "photo.png", 1)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_a_truncated_jpeg_is_named_with_the_way_on(keep: float) -> None:
    data = encode(pixels(0, (64, 64)), "JPEG")
    with pytest.raises(UserError) as caught:
        decode_image(data[: int(len(data) * keep)], "class/broken.jpg", 3)
    assert str(caught.value).startswith("class/broken.jpg is not a whole image")
    assert "remove it" in str(caught.value)
    assert "0x" not in str(caught.value)


def test_bytes_that_are_no_image_are_named() -> None:
    for data in (b"", b"hello", encode(pixels(0))[:30]):
        with pytest.raises(UserError, match="notes is not a whole image"):
            decode_image(data, "notes", 3)
    with pytest.raises(UserError, match="notes is not a whole image"):
        read_header(b"hello", "notes")


def test_the_first_broken_file_is_the_one_that_is_named() -> None:
    files = [encode(pixels(seed)) for seed in range(300)]
    files[70] = files[70][:40]
    files[299] = b""
    with pytest.raises(UserError, match="file 70 is not"):
        decode_all(Bytes(files), list(range(300)), 3, (8, 8), resize=False, threads=4)


def test_another_size_is_an_error_unless_resized() -> None:
    files = [encode(pixels(0)), encode(pixels(1, (8, 12)))]
    with pytest.raises(UserError, match=r"file 1 is 12x8, others 8x8 pixels\); set image_size"):
        decode_all(Bytes(files), [0, 1], 3, (8, 8), resize=False)
    assert decode_all(Bytes(files), [0, 1], 3, (6, 6), resize=True).shape == (2, 3, 6, 6)


def test_fit_keeps_the_center() -> None:
    stripes = np.zeros((8, 16, 3), np.uint8)
    stripes[:, 4:12] = 200  # exactly the central square
    assert np.array_equal(np.asarray(fit(Image.fromarray(stripes), (8, 8))), np.full((8, 8, 3), 200))
    half = np.asarray(fit(Image.fromarray(stripes), (8, 8), ratio=2.0))  # the middle quarter, twice as large
    assert np.array_equal(half, np.full((8, 8, 3), 200))


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(64, 32), (32, 64), (48, 48)])
def test_fit_is_resize_and_center_crop(height: int, width: int, ratio: int) -> None:
    image = Image.fromarray(pixels(5, (height, width)))
    shorter = min(height, width)
    scaled = image.resize(
        (width * 8 * ratio // shorter, height * 8 * ratio // shorter), Image.Resampling.BILINEAR
    )
    left, top = (scaled.width - 8) // 2, (scaled.height - 8) // 2
    cropped = np.asarray(scaled.crop((left, top, left + 8, top + 8))).astype(int)
    assert np.abs(np.asarray(fit(image, (8, 8), ratio)).astype(int) - cropped).max() <= 1  # rounding


def test_fit_leaves_the_right_size_alone() -> None:
    image = Image.fromarray(pixels(0))
    assert fit(image, (8, 8), ratio=256 / 224) is image
