"""``digits``: scikit-learn's 1,797 real handwritten digits, 8x8 pixels, part of the package itself."""

from __future__ import annotations

import numpy as np
import torch

from clicktrain.data.listing import ListedSplit, Listing

_PERIOD = 5  # every fifth image of a class is for validation


def list_digits() -> Listing:
    """Return the digits as gray uint8 images, 0 to 255.

    The split is fixed and depends on no seed: in the order of the data set, every fifth image of each class
    is a validation image (355 of 1,797).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        is_val[(labels == label).nonzero().flatten()[_PERIOD - 1 :: _PERIOD]] = True
    return Listing(
        classes=tuple(str(digit) for digit in range(10)),
        train=ListedSplit(pixels[~is_val], labels[~is_val]),
        val=ListedSplit(pixels[is_val], labels[is_val]),
    )
