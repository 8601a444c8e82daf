from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.data.listing import ListedSplit, Listing, stratified_split
from clicktrain.errors import UserError


def split(*labels: int) -> ListedSplit:
    return ListedSplit(
        torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), torch.tensor(labels, dtype=torch.int64)
    )


def check(
    train: ListedSplit, val: ListedSplit | None, classes: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    return Listing(classes, train, val).check("DATA")


def test_classes_without_names_are_numbered() -> None:
    assert check(split(0, 2, 1), split(1)) == ("0", "1", "2")


def test_a_named_class_may_have_no_images_at_all() -> None:
    assert check(split(0, 2), split(2), ("a", "b", "c")) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("train", "val", "classes", "fragments"),
    [
        (split(), None, None, ["empty", "no training images"]),
        (split(0, 1), split(), None, ["no validation images"]),
        (split(0, 0, 0), None, ("a", "b"), ["one class only ('a')", "two classes"]),
        (split(0, 1, 3), None, ("a", "b", "c"), ["image 2 has label 3", "labels are 0 to 2"]),
        (split(0, 1, -1), None, None, ["image 2 has label -1", "without a label"]),
        (split(0, 1), split(0, -7), None, ["image 1 has label -7", "0 to 1"]),
        (split(0, 1), split(0, 2), None, ["image 1 has label 2", "0 to 1"]),
        (split(0, 1), split(0, 2), ("a", "b", "c"), ["class 'c'", "no training images"]),
        (split(0, 1, 10**9), None, None, ["image 2 has label 1000000000", "count from 0"]),
    ],
)
def test_what_is_wrong_is_named(
    train: ListedSplit, val: ListedSplit | None, classes: tuple[str, ...] | None, fragments: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check(train, val, classes)
    assert "'DATA'" in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


@given(
    counts=st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(lambda counts: max(counts) >= 2),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**40),
)
def test_each_class_gives_its_share(counts: list[int], fraction: float, seed: int) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    train, val = stratified_split(labels, fraction, seed, "DATA")
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(labels)))
    for label, count in enumerate(counts):
        held_out = int((labels[val] == label).sum())
        if count < 2:
            assert held_out == 0
        else:
            assert held_out == min(max(round(count * fraction), 1), count - 1)


def test_the_split_depends_on_the_seed_alone() -> None:
    labels = torch.arange(100) % 5
    first, again, other = (stratified_split(labels, 0.2, seed, "DATA")[1] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_image_per_class_cannot_be_split() -> None:
    with pytest.raises(UserError, match="one image per class"):
        stratified_split(torch.arange(5), 0.2, 0, "DATA")
