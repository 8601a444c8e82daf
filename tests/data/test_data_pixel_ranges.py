"""Pixel values beyond 8 bits, every color mode, and files that are not what they are called."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encode, pixels
from PIL import Image

from clicktrain.data import Augment, PixelSource, make_loader, open_data
from clicktrain.data.decode import decode_image, to_pixels
from clicktrain.data.image_files import read_header
from clicktrain.data.statistics import EIGHT_BIT, ValueRange
from clicktrain.errors import UserError

Values = np.ndarray[Any, Any]


def png16(values: Values) -> bytes:
    """A 16-bit PNG of [H, W, C] values; Pillow writes none with more than one channel."""
    height, width, channels = values.shape
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(values: Values, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", **options)
    return buffer.getvalue()


def noise(low: float, high: float, dtype: str, shape: tuple[int, ...] = (16, 16)) -> Values:
    generator = np.random.default_rng(3)
    found: Values = (generator.random(shape) * (high - low) + low).astype(dtype)
    return found


@pytest.mark.parametrize(
    "data",
    [
        tiff(noise(0, 1, "float32")),
        tiff(noise(-5, 5, "float32")),
        tiff(noise(0, 1e30, "float32")),
        tiff(noise(0, 256, "int32")),
        tiff(noise(-1024, 3071, "int32")),
        tiff(noise(0, 2**31 - 1, "int32")),
        tiff(noise(0, 4096, "uint16"), compression="tiff_lzw"),
        encode(noise(0, 256, "uint16")),
        encode(noise(0, 4096, "uint16")),
        encode(noise(0, 65536, "uint16")),
        png16(noise(0, 4096, "uint16", (16, 16, 2))),
    ],
)
def test_values_of_any_range_fill_8_bits(data: bytes) -> None:
    assert read_header(data, "x").deep
    assert read_header(data, "x").gray
    found = to_pixels(decode_image(data, "x", 1))
    assert (found.min(), found.max()) == (0, 255)
    assert found.unique().numel() > 100
    assert torch.equal(to_pixels(decode_image(data, "x", 3)), found.expand(3, -1, -1))


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("largest", [255, 4095, 65535])
def test_16_bit_colors_keep_both_bytes(channels: int, largest: int) -> None:
    values = noise(0, largest + 1, "uint16", (16, 16, channels))
    values[0, 0, :3] = 0, largest, largest
    data = png16(values)
    assert read_header(data, "x").deep
    found = to_pixels(decode_image(data, "x", 3)).permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.rint(values[..., :3] * (255 / largest)).astype(np.uint8))
    with pytest.raises(UserError, match="x is in color"):
        decode_image(data, "x", 1)


def test_16_bit_gray_with_transparency_keeps_both_bytes() -> None:
    values = noise(0, 4096, "uint16", (16, 16, 2))
    values[0, 0, 0], values[0, 1, 0] = 0, 4095
    found = to_pixels(decode_image(png16(values), "x", 1))[0].numpy()
    assert np.array_equal(found, np.rint(values[..., 0] * (255 / 4095)).astype(np.uint8))


def test_a_range_of_the_data_set_keeps_images_comparable() -> None:
    values = ValueRange(0, 4095)
    dark = to_pixels(decode_image(encode(noise(0, 410, "uint16")), "x", 1, values))
    assert 20 <= dark.max() <= 26
    assert to_pixels(decode_image(encode(np.full((4, 4), 60000, np.uint16)), "x", 1, values)).min() == 255


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(np.full((4, 4), 7, np.uint16)), 7),
        (encode(np.full((4, 4), 700, np.uint16)), 255),
        (tiff(np.full((4, 4), 0.5, np.float32)), 128),
        (tiff(np.full((4, 4), -3.0, np.float32)), 0),
        (encode(np.full((4, 4), 9, np.uint8)), 9),
    ],
)
def test_constant_images_stay_constant(data: bytes, expected: int) -> None:
    assert to_pixels(decode_image(data, "x", 1)).unique().tolist() == [expected]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(wrong: float) -> None:
    values = noise(0, 1, "float32")
    values[2, 3] = wrong
    with pytest.raises(UserError, match=r"x has pixels that are NaN or infinite"):
        decode_image(tiff(values), "x", 1)


def test_depths_are_not_mixed() -> None:
    with pytest.raises(UserError, match="deep has more than 8 bits per value"):
        decode_image(encode(noise(0, 256, "uint16")), "deep", 1, EIGHT_BIT)
    with pytest.raises(UserError, match="flat has 8 bits or fewer per value"):
        decode_image(encode(pixels(0, channels=1)), "flat", 1, ValueRange(0, 4095))


# ---------------------------------------------------------------- other modes


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_one_bit_is_black_and_white() -> None:
    image = Image.fromarray(pixels(0, channels=1)).convert("1")
    assert set(to_pixels(decode_image(saved(image, "PNG"), "x", 1)).unique().tolist()) <= {0, 255}


def test_palettes_cmyk_and_ycbcr_become_rgb() -> None:
    colors = Image.fromarray(pixels(1, (16, 16)))
    exact = torch.from_numpy(pixels(1, (16, 16)).copy()).permute(2, 0, 1).int()
    for image, form, close in (
        (colors.quantize(255), "PNG", 30), (colors.convert("CMYK"), "TIFF", 2), (colors.convert("CMYK"),
        "JPEG", 30),
        (colors.convert("YCbCr"), "TIFF", 4), (colors.quantize(255), "GIF", 30),
    ):  # fmt: skip
        found = to_pixels(decode_image(saved(image, form), "x", 3)).int()
        assert (found - exact).abs().max() <= close, (image.mode, form)


def test_lab_is_converted_or_refused() -> None:
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.fromarray(pixels(0)), *profiles, outputMode="LAB")
    assert lab is not None
    try:
        lab.convert("RGB")
    except ValueError:  # Pillow before version 13
        with pytest.raises(UserError, match="x is not a whole image"):
            decode_image(saved(lab, "TIFF"), "x", 3)
        return
    found = to_pixels(decode_image(saved(lab, "TIFF"), "x", 3)).permute(1, 2, 0).int()
    assert (found - torch.from_numpy(pixels(0).copy()).int()).abs().max() < 40


@pytest.mark.parametrize("kind", ["LA", "RGBA", "WebP"])
def test_transparency_is_dropped_but_not_where_it_is_the_picture(kind: str) -> None:
    shape = Image.fromarray(pixels(2, channels=1))
    base = Image.fromarray(pixels(3)).convert("RGBA")
    base.putalpha(shape)
    found = to_pixels(decode_image(saved(base, "PNG"), "x", 3)).permute(1, 2, 0)
    assert np.array_equal(found.numpy(), pixels(3))
    black = Image.new("RGBA", (8, 8))
    black.putalpha(shape)
    data = {
        "LA": lambda: saved(black.convert("LA"), "PNG"),
        "RGBA": lambda: saved(black, "PNG"),
        "WebP": lambda: saved(black, "WEBP", lossless=True, exact=True),
    }[kind]()
    with pytest.raises(UserError, match="x has a picture in its transparency only"):
        decode_image(data, "x", 3)
    opaque = Image.new("RGBA", (8, 8), (1, 2, 3, 255))
    assert to_pixels(decode_image(saved(opaque, "PNG"), "x", 3))[:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_several_frames_the_first_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in (10, 200)]
    options = {"save_all": True, "append_images": frames[1:]}
    data = saved(frames[0], form, **options, **({"lossless": True} if form == "WEBP" else {}))
    assert to_pixels(decode_image(data, "x", 3)).unique().tolist() == [10]


def test_an_exif_rotation_is_not_applied() -> None:
    image = Image.fromarray(pixels(4, (8, 12)))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(saved(image, "PNG", exif=exif), "x", 3).size == (12, 8)


# ---------------------------------------------------------------- files


def test_a_format_that_is_not_on_the_list_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(os, "system", start)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"  # Pillow alone would
    for reader in (lambda: decode_image(eps, "cat.png", 3), lambda: read_header(eps, "cat.png")):
        with pytest.raises(UserError, match=r"cat\.png is not a whole image \(not of the formats JPEG, PNG"):
            reader()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("keep", [0.1, 0.4, 0.7])
def test_every_format_cut_short_is_named(form: str, keep: float) -> None:
    generator = np.random.default_rng(0)
    data = encode(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8), form)
    with pytest.raises(UserError, match="class/0 is not a whole image"):
        decode_image(data[: int(len(data) * keep)], "class/0", 3)


def test_sizes_are_bounded_before_they_are_decoded() -> None:
    with pytest.raises(UserError, match="x has more pixels than are safe to decode"):
        read_header(b"P5 60000 60000 255\n" + bytes(64), "x")


# ---------------------------------------------------------------- data sets


def deep_folder(root: Path, largest: int = 4095) -> None:
    for number, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for index in range(4):
            values = noise(0, largest / 8 if number == 0 else largest, "uint16", (8, 8)) + index
            (root / name / f"{index}.png").write_bytes(encode(values))


def test_a_data_set_has_one_scale_in_memory_in_the_cache_and_while_streaming(
    tmp_path: Path, cache_dir: Path
) -> None:
    deep_folder(tmp_path / "set")
    spec = f"imagefolder:{tmp_path / 'set'}"
    data = open_data(spec, cache_dir=cache_dir)
    assert isinstance(data.train, PixelSource)
    low, high = data.value_range or (0, 0)
    assert high > 3900
    assert data.train.images[data.train.labels == 0].max() < 40 < data.train.images.max() == 255
    assert f"pixel values {low:g} to {high:g} scaled to 0 to 255" in data.describe()
    again = open_data(spec, cache_dir=cache_dir)
    assert again.value_range == data.value_range
    assert isinstance(again.train, PixelSource)
    assert torch.equal(again.train.images, data.train.images)
    for _ in range(2):
        streamed = open_data(spec, cache_dir=cache_dir, memory_limit=10, workers=0)
        assert streamed.value_range == data.value_range
        assert streamed.mean == pytest.approx(data.mean, abs=0.01)
        device = torch.device("cpu")
        loader = make_loader(
            streamed, "val", batch_size=8, device=device, seed=0, augment=Augment(), drop_last=False
        )
        pixel = torch.cat([x for x, _ in loader.epoch(0)]) * streamed.std[0] + streamed.mean[0]
        assert isinstance(data.val, PixelSource)
        assert torch.allclose(pixel * 255, data.val.images.float(), atol=1e-3)


def test_the_range_that_a_network_was_trained_with_can_be_given(tmp_path: Path, cache_dir: Path) -> None:
    deep_folder(tmp_path / "set", largest=1023)
    data = open_data(f"imagefolder:{tmp_path / 'set'}", cache_dir=cache_dir, value_range=(0, 4095))
    assert data.value_range == (0, 4095)
    assert isinstance(data.train, PixelSource)
    assert 60 <= data.train.images.max() <= 64


def test_a_data_set_of_two_depths_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    deep_folder(tmp_path / "set")
    (tmp_path / "set" / "dark" / "0.png").write_bytes(encode(pixels(0, channels=1)))
    with pytest.raises(UserError, match=r"has more than 8 bits per value and .*dark.0.png has not"):
        open_data(f"imagefolder:{tmp_path / 'set'}", cache_dir=cache_dir)
