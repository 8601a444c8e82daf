"""The images of a source before they are decoded, and the checks that every source passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clicktrain.data.draws import seeded_generator
from clicktrain.data.image_files import LARGEST_FILE
from clicktrain.errors import UserError
from clicktrain.files import read_regular


class EncodedImages(Protocol):
    """Images as their files hold them (JPEG, PNG, ...), to be decoded one by one."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Return the bytes of one image file."""

    def name(self, index: int) -> str:
        """Return what a message calls this image, such as its path."""


class FileImages:
    """Images that are files of their own."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> bytes:
        """Return the bytes of one image file."""
        try:
            return read_regular(self._paths[index], LARGEST_FILE)
        except OSError as error:
            raise UserError(
                f"{self._paths[index]} cannot be read ({error.strerror}); make it readable or remove it"
            ) from error

    def name(self, index: int) -> str:
        """Return the path."""
        return self._paths[index]


class SubsetImages:
    """Some of the images of another collection."""

    def __init__(self, images: EncodedImages, indices: Tensor) -> None:
        self._images = images
        self._indices: list[int] = indices.tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        """Return the bytes of one image file."""
        return self._images.read(self._indices[index])

    def name(self, index: int) -> str:
        """Return the name in the full collection."""
        return self._images.name(self._indices[index])


@dataclass(frozen=True, eq=False)
class ListedSplit:
    """One split: encoded images, or uint8 [N, C, H, W] where the source holds pixels; int64 labels [N]."""

    images: EncodedImages | Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return what a message calls this image."""
        return f"image {index}" if isinstance(self.images, Tensor) else self.images.name(index)


@dataclass(frozen=True, eq=False)
class Listing:
    """A data set as its source describes it.

    ``val`` is None where the source has no validation split. ``fingerprint`` gives a text that changes
    whenever the files do (None: not to be cached).
    """

    classes: tuple[str, ...] | None
    train: ListedSplit
    val: ListedSplit | None
    fingerprint: Callable[[], str] | None = None

    @property
    def splits(self) -> list[ListedSplit]:
        """The splits that there are."""
        return [self.train] if self.val is None else [self.train, self.val]

    def check(self, spec: str) -> tuple[str, ...]:
        """Check counts and labels of all splits, and return the class names.

        Raises:
            UserError: no images, labels outside the classes, fewer than two classes, or a validation class
                without training images. The sentence names ``spec`` and the image.
        """
        for split, kind in zip(self.splits, ("training", "validation"), strict=False):
            if len(split) == 0:
                raise UserError(
                    f"data {spec!r} is empty: it holds no {kind} images; at least one per class is needed"
                )
        classes = self.classes or _numbered_classes(self, spec)
        for split in self.splits:
            _check_labels(split, len(classes), spec)
        if len(classes) < 2 or int(self.train.labels.bincount().count_nonzero()) < 2:
            only = classes[int(self.train.labels[0])]
            raise UserError(
                f"data {spec!r} has training images of one class only ({only!r}); at least two classes are "
                "needed"
            )
        if self.val is not None:
            _check_trained(self.train, self.val, classes, spec)
        return classes


def _numbered_classes(listing: Listing, spec: str) -> tuple[str, ...]:
    """Name the classes by their numbers where the source has no names."""
    labels = listing.train.labels
    top = int(labels.argmax())
    count = int(labels[top]) + 1
    if count > max(len(labels), 2):
        raise UserError(
            f"data {spec!r}: {listing.train.name(top)} has label {count - 1}, more than there are images; "
            "labels are class numbers that count from 0"
        )
    return tuple(str(number) for number in range(max(count, 1)))


def _check_labels(split: ListedSplit, num_classes: int, spec: str) -> None:
    wrong = ((split.labels < 0) | (split.labels >= num_classes)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        label = int(split.labels[index])
        meaning = " (-1 stands for an image without a label)" if label == -1 else ""
        raise UserError(
            f"data {spec!r}: {split.name(index)} has label {label}{meaning}; "
            f"with {num_classes} classes labels are 0 to {num_classes - 1}"
        )


def _check_trained(train: ListedSplit, val: ListedSplit, classes: tuple[str, ...], spec: str) -> None:
    trained = torch.zeros(len(classes), dtype=torch.bool)
    trained[train.labels] = True
    unknown = (~trained[val.labels]).nonzero()
    if len(unknown):
        index = int(unknown[0])
        raise UserError(
            f"data {spec!r}: class {classes[int(val.labels[index])]!r} has validation images "
            f"({val.name(index)}) but no training images; add some or remove it from the validation split"
        )


def stratified_split(labels: Tensor, val_fraction: float, seed: int, spec: str) -> tuple[Tensor, Tensor]:
    """Split images so that each class gives the same share to validation; the draw depends on ``seed`` alone.

    A class gives ``val_fraction`` of its images, rounded, but keeps one for training, and gives at least one
    where it has two. Returns ascending indices of the training and of the validation images.
    """
    chance = torch.rand(len(labels), generator=seeded_generator("split", seed))
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.bincount().nonzero().flatten():
        members = (labels == label).nonzero().flatten()
        if len(members) >= 2:
            count = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
            is_val[members[chance[members].argsort()[:count]]] = True
    if not bool(is_val.any()):
        raise UserError(
            f"data {spec!r} has one image per class, which leaves none for validation; two per class are "
            "needed"
        )
    return (~is_val).nonzero().flatten(), is_val.nonzero().flatten()
