from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_files import pixels, write_parquet

from clicktrain.data import EncodedSource, ImageData, PixelSource, open_data
from clicktrain.errors import UserError

# importing the library itself raises warnings in some of its versions
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the library reads as OWNER/NAME, as it would read one of the Hub."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "owner" / "name"


def opened(cache_dir: Path, **settings: int) -> ImageData:
    return open_data("owner/name", cache_dir=cache_dir, **settings)  # type: ignore[arg-type]


def test_image_and_label_are_found_by_their_types(here: Path, cache_dir: Path) -> None:
    write_parquet(
        here / "train.parquet", [0, 1, 0], names=["no", "yes"], image_column="photo", label_column="answer"
    )
    write_parquet(
        here / "test.parquet", [1], names=["no", "yes"], image_column="photo", label_column="answer", seed=9
    )
    data = opened(cache_dir)
    assert data.classes == ("no", "yes")
    assert isinstance(data.train, PixelSource)
    assert isinstance(data.val, PixelSource)
    assert data.train.labels.tolist() == [0, 1, 0]
    assert np.array_equal(data.train.images[2].permute(1, 2, 0).numpy(), pixels(2))
    assert np.array_equal(data.val.images[0].permute(1, 2, 0).numpy(), pixels(9))
    streamed = opened(cache_dir, memory_limit=0, workers=0)
    assert isinstance(streamed.train, EncodedSource)
    assert streamed.train.images.name(1).startswith("owner/name train (")
    assert streamed.train.images.name(1).endswith("row 1")


def test_a_set_without_images_is_named(here: Path, cache_dir: Path) -> None:
    here.mkdir(parents=True)
    (here / "train.csv").write_text("text,label\nhello,0\nworld,1\n")
    with pytest.raises(
        UserError, match=r"'owner/name' has no single image column .*text: .*string, label: int64"
    ):
        opened(cache_dir)


def test_a_set_without_a_train_split_is_named(here: Path, cache_dir: Path) -> None:
    write_parquet(here / "test.parquet", [0, 1])
    with pytest.raises(UserError, match=r"'owner/name' has no train split; it has test"):
        opened(cache_dir)


def test_an_unknown_name_offline_is_one_sentence(cache_dir: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_data("digts", cache_dir=cache_dir)
    message = str(caught.value)
    assert message.startswith("data 'digts' could not be loaded from the Hugging Face Hub (")
    assert "check the name and the network" in message
    assert "parquet:DIR" in message
    assert message.endswith("did you mean digits?")
    assert "\n" not in message
