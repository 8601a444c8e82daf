"""``imagefolder:DIR``: a folder per class, as ImageNet, Tiny-ImageNet and most home-made sets have it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from clicktrain.data.cache import files_fingerprint
from clicktrain.data.listing import FileImages, ListedSplit, Listing
from clicktrain.errors import UserError
from clicktrain.files import check_regular, read_text

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff")
_VAL_NAMES = ("val", "validation", "valid", "test")
_ANNOTATIONS = "val_annotations.txt"


def list_image_folder(argument: str) -> Listing:
    """List images by their folders; classes are the sorted folder names.

    Layouts: ``DIR/train/CLASS/...`` with ``DIR/val/CLASS/...`` (or ``validation``, ``valid``, ``test``);
    Tiny-ImageNet's, where ``DIR/val/val_annotations.txt`` says the class of each file of ``DIR/val/images``;
    ``DIR/train`` alone or ``DIR/CLASS/...``, where no validation split exists. Images may lie in folders
    inside the class folder. Hidden files and files that are no images by their suffix are passed over.

    Raises:
        UserError: no such folder, no class folders, or a class without images; names it.
    """
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise UserError(
            f"data imagefolder:{argument}: {root} is not a folder; give the one that holds the classes"
        )
    train_root = root / "train" if (root / "train").is_dir() else root
    classes = _folders(train_root)
    if not classes:
        raise UserError(
            f"data imagefolder:{argument}: {train_root} has no class folders; images belong in "
            f"{train_root}/CLASS/"
        )
    train_paths, train_labels = _walk_classes(train_root, classes)
    val_root = next((root / name for name in _VAL_NAMES if (root / name).is_dir()), None)
    val: tuple[list[str], list[int]] | None = None
    if train_root != root and val_root is not None:
        if (val_root / _ANNOTATIONS).is_file():
            val = _read_annotations(val_root, classes)
        else:
            val = _walk_validation(val_root, classes)
    paths = [Path(path) for path in train_paths + (val[0] if val else [])]
    return Listing(
        classes=tuple(classes),
        train=ListedSplit(FileImages(train_paths), torch.tensor(train_labels, dtype=torch.int64)),
        val=val and ListedSplit(FileImages(val[0]), torch.tensor(val[1], dtype=torch.int64)),
        fingerprint=lambda: files_fingerprint(paths),
    )


def _folders(root: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")
    )


def _images_below(folder: Path) -> list[str]:
    """Return the image files of a folder and the folders in it, links followed, in a fixed order.

    Raises:
        UserError: a link to a folder that it lies in, or an image that is a pipe, a device or a dead link.
    """
    images: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(str(folder), frozenset())]
    while waiting:
        here, above = waiting.pop()
        status = os.stat(here)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise UserError(f"{here} is a link to a folder that it lies in; remove the link")
        for entry in os.scandir(here):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                waiting.append((entry.path, above | {identity}))
            elif entry.name.lower().endswith(_SUFFIXES):
                try:
                    check_regular(entry.path, entry.stat())
                except OSError as error:
                    raise UserError(f"{entry.path} cannot be read ({error.strerror}); remove it") from error
                images.append(entry.path)
    return sorted(images)


def _walk_classes(root: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = _images_below(root / name)
        if not images:
            raise UserError(
                f"class folder {root / name} holds no images ({', '.join(_SUFFIXES)}); add some or remove "
                "the folder"
            )
        paths += images
        labels += [label] * len(images)
    return paths, labels


def _walk_validation(root: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    names = _folders(root)
    unknown = [name for name in names if name not in set(classes)]
    if unknown:
        raise UserError(
            f"{root / unknown[0]} is a class that has no training images; add {unknown[0]!r} to the training "
            "folders or remove it"
        )
    if not names:
        raise UserError(f"{root} has no class folders; validation images belong in {root}/CLASS/")
    paths, labels = _walk_classes(root, names)
    number = {name: label for label, name in enumerate(classes)}
    return paths, [number[names[label]] for label in labels]


def _read_annotations(root: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """Read Tiny-ImageNet's validation labels: lines of file name, class, box, separated by tabs."""
    number = {name: label for label, name in enumerate(classes)}
    annotations = root / _ANNOTATIONS
    try:
        lines = read_text(annotations).splitlines()
    except OSError as error:
        raise UserError(f"{annotations} cannot be read ({error}); extract the data set again") from error
    paths: list[str] = []
    labels: list[int] = []
    for row, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise UserError(
                f"{annotations} line {row} ({line[:60]!r}) names no training class; a line is the file name, "
                "a tab and the class"
            )
        path = root / "images" / fields[0]
        if Path(fields[0]).name != fields[0] or not path.is_file():
            raise UserError(
                f"{annotations} line {row} names {path}, which does not exist; extract the data set again"
            )
        paths.append(str(path))
        labels.append(number[fields[1]])
    return paths, labels
