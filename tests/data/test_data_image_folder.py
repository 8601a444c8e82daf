from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from image_files import encode, pixels, write_class_folders

from clicktrain.data.sources.image_folder import list_image_folder
from clicktrain.errors import UserError


def names(listing_split: object, root: Path) -> list[str]:
    images = listing_split.images  # type: ignore[attr-defined]
    return [str(Path(images.name(index)).relative_to(root)) for index in range(len(images))]


def test_imagenet_layout(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", ("n02", "n01"), 2, suffix="jpg")
    write_class_folders(tmp_path / "val", ("n01", "n02"), 1, suffix="jpg")
    listing = list_image_folder(str(tmp_path))
    assert listing.classes == ("n01", "n02")
    expected = ["train/n01/0.jpg", "train/n01/1.jpg", "train/n02/0.jpg", "train/n02/1.jpg"]
    assert names(listing.train, tmp_path) == expected
    assert listing.train.labels.tolist() == [0, 0, 1, 1]
    assert listing.val is not None
    assert names(listing.val, tmp_path) == ["val/n01/0.jpg", "val/n02/0.jpg"]


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_the_validation_folder(tmp_path: Path, name: str) -> None:
    write_class_folders(tmp_path / "train", ("a", "b", "c"))
    write_class_folders(tmp_path / name, ("c", "a"), 1)
    val = list_image_folder(str(tmp_path)).val
    assert val is not None
    assert val.labels.tolist() == [0, 2]


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    for name in ("n1", "n2"):
        write_class_folders(tmp_path / "train" / name, ("images",), 3)
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("0\t0\t1\t1\n")
    write_class_folders(tmp_path / "val", ("images",), 3)
    write_class_folders(tmp_path / "test", ("images",), 2)
    lines = ["2.png\tn1\t0\t0\t62\t62", "0.png\tn2\t0\t0\t62\t62", "1.png\tn2\t0\t0\t62\t62"]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_tiny_imagenet_layout(tiny_imagenet: Path) -> None:
    listing = list_image_folder(str(tiny_imagenet))
    assert listing.classes == ("n1", "n2")
    assert names(listing.train, tiny_imagenet)[0] == "train/n1/images/0.png"
    assert listing.val is not None
    assert names(listing.val, tiny_imagenet) == [f"val/images/{index}.png" for index in (2, 0, 1)]
    assert listing.val.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("9.png\tn1\t0", "line 1 names .*9.png, which does not exist"),
        ("0.png\tn9\t0", "line 1 .* names no training class"),
        ("0.png", "line 1 .* names no training class"),
    ],
)
def test_a_wrong_annotation_is_named(tiny_imagenet: Path, line: str, fragment: str) -> None:
    (tiny_imagenet / "val" / "val_annotations.txt").write_text(line)
    with pytest.raises(UserError, match=fragment):
        list_image_folder(str(tiny_imagenet))


@pytest.mark.parametrize("below", [".", "train"])
def test_class_folders_alone_have_no_validation(tmp_path: Path, below: str) -> None:
    write_class_folders(tmp_path / below, ("b", "a"))
    listing = list_image_folder(str(tmp_path))
    assert listing.val is None
    assert listing.classes == ("a", "b")


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ("a", "b"), 2)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / "._0.png").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / "UPPER.PNG").write_bytes(encode(pixels(0)))
    assert names(list_image_folder(str(tmp_path)).train, tmp_path) == [
        "a/0.png",
        "a/1.png",
        "a/UPPER.PNG",
        "b/0.png",
        "b/1.png",
    ]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        list_image_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has no class folders; images belong in .*/CLASS/"):
        list_image_folder(str(tmp_path))
    write_class_folders(tmp_path / "train")
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(UserError, match=r"class folder .*train/emu holds no images"):
        list_image_folder(str(tmp_path))


def test_a_class_that_is_only_validated_is_named(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train")
    write_class_folders(tmp_path / "val", ("cat", "emu"))
    with pytest.raises(UserError, match=r"val/emu is a class that has no training images"):
        list_image_folder(str(tmp_path))
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=r"val has no class folders"):
        list_image_folder(str(tmp_path))
