from __future__ import annotations

from pathlib import Path

import pytest

from clicktrain.data import DataSpec, open_data
from clicktrain.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits", DataSpec("digits")),
        ("parquet:../some dir", DataSpec("parquet", "../some dir")),
        ("imagefolder:/data/a:b", DataSpec("imagefolder", "/data/a:b")),
        ("cifar10:x", DataSpec("cifar10", "x")),
        ("cifar100:x", DataSpec("cifar100", "x")),
        ("cifar10", DataSpec("hub", "cifar10")),
        ("synthetic", DataSpec("synthetic")),
        ("synthetic:classes=3", DataSpec("synthetic", "classes=3")),
        ("uoft-cs/cifar10", DataSpec("hub", "uoft-cs/cifar10")),
        ("owner/name:plain_text", DataSpec("hub", "owner/name", "plain_text")),
    ],
)
def test_every_form_is_read(text: str, expected: DataSpec) -> None:
    assert DataSpec.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (
            "",
            "none of the known forms: digits, parquet:DIR, parquet-shards:DIR, webdataset:DIR, imagefolder",
        ),
        ("ftp://x/y", "none of the known forms"),
        ("a/b/c", "none of the known forms"),
        ("parqet:/data/x", "did you mean parquet:/data/x?"),
        ("parquet", "write parquet:DIR"),
        ("imagefolder:", "write imagefolder:DIR"),
        ("digits:5", "write digits"),
    ],
)
def test_other_texts_are_refused_with_what_would_be_right(text: str, fragment: str) -> None:
    with pytest.raises(UserError) as caught:
        DataSpec.parse(text)
    assert fragment in str(caught.value)


def test_a_bare_folder_is_refused_with_its_two_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="write imagefolder:photos or parquet:photos"):
        DataSpec.parse("photos")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": 0.0}, "val_fraction=0.0"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, int], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        open_data("digits", **arguments)  # type: ignore[arg-type]
