"""Data sets: images of every mode and format, broken and hostile files, labels that are none."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from cases import Case, Expected
from PIL import Image
from wrong_values import TEXTS, damaged

from clicktrain.data import Augment, make_loader, open_data

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(code_was_run) (w) file closefile\nshowpage\n"
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
MODES: dict[str, tuple[str, ...]] = {
    "PNG": ("1", "L", "LA", "RGB", "RGBA", "P", "I;16"), "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "RGB"), "BMP": ("1", "L", "RGB", "P"), "WEBP": ("RGB", "RGBA"), "PPM": ("1", "L",
    "RGB"),
    "TIFF": ("1", "L", "LA", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "P", "LAB", "YCbCr"),
}  # fmt: skip
LABELS: tuple[tuple[Any, Any], ...] = (
    ([0, 1] * 6, pa.int64()), ([0, 2**64 - 1] * 6, pa.uint64()), ([0, -1] * 6, pa.int64()), ([0] * 12,
    pa.int64()),
    ([0, 10**9] * 6, pa.int64()), (["a", "b"] * 6, pa.string()), ([0.0, 1.0] * 6, pa.float64()),
    ([None, 1] * 6, pa.int64()), ([], pa.int64()), ([True, False] * 6, pa.bool_()), ([5, 7] * 6, pa.int8()),
    ([[0], [1]] * 6, pa.list_(pa.int64())), ([0, 2**31] * 6, pa.uint32()), ([0, 2**63 - 1] * 6, pa.int64()),
)  # fmt: skip
SYNTHETIC = ("classes", "size", "channels", "train", "val", "seed", "colour", "")


def cases(rng: random.Random, count: int) -> list[Case]:
    """``count`` data sets, opened and read to the end."""
    makers = (
        _image_folder, _image_folder, _image_folder, _parquet, _parquet, _synthetic, _spec, _archive,
        _tar_shards,
    )  # fmt: skip
    return [rng.choice(makers)(rng) for _ in range(count)]


def _open(spec: str, image_size: int | None = None, memory: int | None = None) -> None:
    """Open a data set and take every batch: complete means finite pixels of the shape that it says."""
    limits = {} if memory is None else {"memory_limit": memory}
    data = open_data(spec, image_size=image_size, workers=0, **limits)  # type: ignore[arg-type]
    for split in ("train", "val"):
        device, plain = torch.device("cpu"), Augment()
        loader = make_loader(
            data, split, batch_size=4, device=device, seed=0, augment=plain,
            drop_last=False  # type: ignore[arg-type]
        )  # fmt: skip
        for x, y in loader.epoch(0):
            assert tuple(x.shape[1:]) == data.image_shape
            assert bool(torch.isfinite(x).all())
            assert bool(((y >= 0) & (y < len(data.classes))).all())


def _array(mode: str, rng: random.Random) -> Image.Image:
    generator = np.random.default_rng(rng.getrandbits(32))
    size = (8, 8)
    if mode == "F":
        values = generator.normal(size=size).astype(np.float32) * rng.choice((1, 1e-3, 1e30))
        if rng.random() < 0.2:
            values[0, 0] = rng.choice((np.nan, np.inf))
        return Image.fromarray(values)
    if mode == "I":
        return Image.fromarray(generator.integers(0, rng.choice((2, 256, 2**31)), size).astype(np.int32))
    if mode == "I;16":
        return Image.fromarray(
            generator.integers(0, rng.choice((2, 256, 4096, 65536)), size).astype(np.uint16)
        )
    rgb = Image.fromarray(generator.integers(0, 256, (*size, 3)).astype(np.uint8))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        changed = ImageCms.profileToProfile(rgb, *profiles, outputMode="LAB")
        assert changed is not None
        return changed
    if mode == "LA":
        return rgb.convert("RGBA").convert("LA")
    return rgb.convert(mode)


def image_bytes(rng: random.Random, form: str | None = None, mode: str | None = None) -> bytes:
    """A small image file of some format and mode."""
    form = form or rng.choice(FORMATS)
    buffer = io.BytesIO()
    mode = mode if mode in MODES[form] else rng.choice(MODES[form])
    image = _array(mode, rng)
    more: dict[str, Any] = {}
    if form in ("GIF", "WEBP", "TIFF") and rng.random() < 0.2 and mode != "LAB":
        more = {"save_all": True, "append_images": [_array(mode, rng)]}
    image.save(buffer, form, **more)
    return buffer.getvalue()


def _hostile(path: Path, rng: random.Random) -> str:
    """Put something beside the images that is none; returns what."""
    kind = rng.choice(
        ("eps", "fifo", "device", "loop", "dead", "bomb", "html", "empty", "damaged", "size", "folder")
    )
    if kind == "eps":
        path.write_bytes(EPS)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/tty", "/dev/stdin")))
    elif kind == "loop":
        path.with_suffix("").symlink_to(rng.choice(("..", ".")))
    elif kind == "dead":
        path.symlink_to("nowhere.png")
    elif kind == "bomb":
        header = f"P5 {rng.choice((60000, 10**6, 2**31 - 1))} {rng.choice((60000, 10**6))} 255\n"
        path.write_bytes(header.encode() + bytes(64))
    elif kind == "html":
        path.write_bytes(b"<html>not found</html>")
    elif kind == "empty":
        path.touch()
    elif kind == "damaged":
        path.write_bytes(damaged(image_bytes(rng), rng))
    elif kind == "size":
        Image.new("RGB", (rng.choice((1, 7, 500)), 9)).save(path)
    else:
        path.mkdir()
    return kind


def _image_folder(rng: random.Random) -> Case:
    seed = rng.random()
    mixed, hostile = rng.random() < 0.25, rng.random() < 0.5
    size, memory = rng.choice((None, None, 4, 30)), rng.choice((None, 10))

    def act(place: Path) -> None:
        own = random.Random(seed)
        form = own.choice(FORMATS)
        mode = own.choice(MODES[form])
        for name in ("cat", "dog", "\u0661 \U0001f642")[: own.choice((1, 2, 2, 2, 3))]:
            (place / "set" / name).mkdir(parents=True)
            for number in range(own.choice((1, 3, 3))):
                data = image_bytes(own) if mixed else image_bytes(own, form, mode)
                (place / "set" / name / f"{number}.png").write_bytes(data)
        if hostile:
            _hostile(place / "set" / "cat" / "odd.png", own)
        _open("imagefolder:set", size, memory)

    return Case("data", f"imagefolder mixed={mixed} hostile={hostile} size={size} memory={memory}", act)


def _parquet(rng: random.Random) -> Case:
    seed = rng.random()
    labels, kind = rng.choice(LABELS)
    wrong = rng.choice(("", "", "null", "damaged", "path", "text", "file", "twice", "no image", "shards"))
    plain = (labels, kind, wrong) == (*LABELS[0], "")
    memory, form = rng.choice((None, 10)), rng.choice(("parquet", "parquet", "parquet-shards"))

    def act(place: Path) -> None:
        own = random.Random(seed)
        images: list[Any] = [image_bytes(own, "PNG", "RGB") for _ in labels]
        if wrong == "null" and images:
            images[own.randrange(len(images))] = None
        elif wrong == "damaged" and images:
            images[0] = damaged(images[0], own)
        column = pa.array(images, pa.binary())
        if wrong == "path":
            rows = [
                {"bytes": None, "path": own.choice(("/dev/zero", "../x", "a\0b", "/etc/passwd"))}
                for _ in labels
            ]
            column = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        elif wrong == "text":
            column = pa.array(["x"] * len(labels))
        table = {"image": column, "label": pa.array(labels, kind)}
        if wrong == "twice":
            table["target"] = pa.array(labels, kind)
        elif wrong == "no image":
            del table["image"]
        (place / "set").mkdir()
        pq.write_table(pa.table(table), place / "set" / "train.parquet")
        path = place / "set" / "train.parquet"
        if wrong == "file":
            path.write_bytes(damaged(path.read_bytes(), own))
        elif wrong == "shards":
            pq.write_table(pa.table({"other": [1]}), place / "set" / "train-1.parquet")
        _open(f"{form}:set", memory=memory)

    expected: Expected = "accepted" if plain else "either"
    return Case("data", f"{form} labels={labels[:2]!s} of {kind}, {wrong or 'nothing'} wrong", act, expected)


def _synthetic(rng: random.Random) -> Case:
    names = rng.sample(SYNTHETIC, rng.randint(1, 3))
    settings = [f"{name}={rng.choice(TEXTS)}" for name in names]
    spec = "synthetic:" + ",".join(settings)

    return Case("data", spec[:80], lambda place: _open(spec))


def _spec(rng: random.Random) -> Case:
    head = rng.choice(
        ("", "digits", "digits:", "parquet:", "parquet-shards:", "webdataset:", "imagefolder:", "cifar10:",
         "cifar100", "x:y:z")
    )  # fmt: skip
    text = head + rng.choice((*TEXTS, "/dev/null", "/", ".", "a\0b", "~nobody/x", "http://x/y", "$HOME"))

    def act(place: Path) -> None:
        (place / "nothing").touch()
        _open(text)

    return Case("data", f"data {text[:40]!r}", act)


def _archive(rng: random.Random) -> Case:
    kind = rng.choice(("damaged", "outside", "link", "huge", "empty", "pickle", "fifo", "python"))
    seed = rng.random()

    def act(place: Path) -> None:
        own = random.Random(seed)
        (place / "set").mkdir()
        name = "cifar-10-python.tar.gz" if kind in ("pickle", "python") else "cifar-10-binary.tar.gz"
        path = place / "set" / name
        with tarfile.open(path, "w:gz") as archive:
            for batch in ("data_batch_1", "test_batch"):
                suffix = "" if kind in ("pickle", "python") else ".bin"
                content = own.randbytes(3073 * 2)
                if kind == "pickle":
                    content = b"cos\nsystem\n(S'touch code_was_run'\ntR."
                elif kind == "python":
                    content = own.choice(
                        (b"\x80\x04}.", b"\x80\x04]\x94.", b"(dp0\n.", b"\x80\x02K\x01.", b"\x82\x01.")
                    )
                info = tarfile.TarInfo(("../../" if kind == "outside" else "x/") + batch + suffix)
                info.size = len(content)
                if kind == "link":
                    info.type, info.linkname, info.size = tarfile.SYMTYPE, "/etc/passwd", 0
                archive.addfile(info, io.BytesIO(content))
            if kind == "huge":
                info = tarfile.TarInfo("x/data_batch_2.bin")
                info.size = 10**15
                archive.addfile(info)
        if kind == "damaged":
            path.write_bytes(damaged(path.read_bytes(), own))
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "fifo":
            path.unlink()
            os.mkfifo(path)
        _open("cifar10:set")

    return Case("data", f"cifar10 archive, {kind}", act, "refused")


def _tar_shards(rng: random.Random) -> Case:
    wrong = rng.choice(
        ("", "damaged", "cut", "no label", "label", "json", "no image", "twice", "link", "sparse", "huge",
         "empty", "fifo", "image", "dots", "gz")
    )  # fmt: skip
    seed = rng.random()

    def act(place: Path) -> None:
        own = random.Random(seed)
        (place / "set").mkdir()
        path = place / "set" / own.choice(("train.tar", "set-train-0.tar", "0.tar"))
        odd = own.randrange(12)
        with tarfile.open(path, "w") as shard:
            for number in range(12):
                here = number == odd
                name = f"{'...' if wrong == 'dots' and here else ''}d/{number}"
                data = damaged(image_bytes(own, "PNG", "RGB"), own) if wrong == "image" and here else None
                label = own.choice(TEXTS).encode(errors="replace") if wrong == "label" and here else None
                members = {
                    "png": data or image_bytes(own, "PNG", "RGB"),
                    "cls": label or b"%d" % (number % 2),
                }
                if wrong == "json" and here:
                    del members["cls"]
                    members["json"] = own.choice(
                        (b"{", b"[]", b'{"label": 1e999}', b'{"label": {}}', b"[" * 9999)
                    )
                if here and wrong in ("no label", "no image"):
                    del members["cls" if wrong == "no label" else "png"]
                for kind, content in members.items():
                    info = tarfile.TarInfo(f"{name}.{kind}")
                    info.size = 10**15 if wrong == "huge" and here else len(content)
                    if here and wrong in ("link", "sparse"):
                        info.type = tarfile.SYMTYPE if wrong == "link" else tarfile.GNUTYPE_SPARSE
                        info.linkname = "/etc/passwd"
                    if wrong == "huge" and here:
                        shard.addfile(info)
                    else:
                        shard.addfile(info, io.BytesIO(content))
                        if wrong == "twice" and here:
                            shard.addfile(info, io.BytesIO(content))
        content = path.read_bytes()
        if wrong == "damaged":
            path.write_bytes(damaged(content, own))
        elif wrong in ("cut", "empty"):
            path.write_bytes(content[: own.randrange(len(content))] if wrong == "cut" else b"")
        elif wrong == "gz":
            path.rename(path.with_name(f"{path.name}.gz"))
        elif wrong == "fifo":
            path.unlink()
            os.mkfifo(path)
        _open("webdataset:set")

    plain, free = not wrong, wrong in ("damaged", "cut", "image", "label", "dots")
    expected: Expected = "accepted" if plain else "either" if free else "refused"
    return Case("data", f"webdataset, {wrong or 'nothing'} wrong", act, expected)
