"""Every recipe under recipes/ trains a step or two on small data of its kind, on shrunken settings."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import encode, pixels, write_parquet
from PIL import Image
from test_data_cifar import write_python10

from clicktrain.bench.frontier.recipe import read_recipe
from clicktrain.data import Augment
from clicktrain.train import Silent, StepProgress, from_dict
from clicktrain.train.augmentation import augmentation
from clicktrain.train.config import read_settings
from clicktrain.train.fit import fit
from clicktrain.train.prepare import make_eval_loader, prepare

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BATCH, CLASSES = 4, 10

# Sizes and modes as ImageNet has them: upright, wide, tiny, gray, CMYK.
SHAPES = [((50, 37), "RGB"), ((24, 90), "RGB"), ((300, 260), "RGB"), ((40, 40), "L"), ((33, 64), "CMYK")]


def jpeg(seed: int, size: tuple[int, int], mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, size)).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def write_imagenet(root: Path) -> None:
    """``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG`` of mixed sizes."""
    for split, count in (("train", 5), ("val", 2)):
        for number, name in enumerate(("n01440764", "n01443537")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                size, mode = SHAPES[index % len(SHAPES)]
                (folder / f"{name}_{index}.JPEG").write_bytes(jpeg(10 * number + index, size, mode))


def write_tiny_imagenet(root: Path) -> None:
    """``train/CLASS/images/*.JPEG`` and ``val/images`` with their annotations; all 64x64, some gray."""
    names = ("n01443537", "n01629819")
    for number, name in enumerate(names):
        folder = root / "train" / name / "images"
        folder.mkdir(parents=True)
        for index in range(5):
            mode = "L" if index == 3 else "RGB"
            (folder / f"{name}_{index}.JPEG").write_bytes(jpeg(10 * number + index, (64, 64), mode))
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for index in range(4):
        (root / "val" / "images" / f"val_{index}.JPEG").write_bytes(jpeg(50 + index, (64, 64)))
        lines.append(f"val_{index}.JPEG\t{names[index % 2]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def write_cifar_parquet(root: Path) -> None:
    for split, count in (("train", 12 * CLASSES), ("test", CLASSES)):
        images = [encode(pixels(index, (32, 32))) for index in range(count)]
        labels = [index % CLASSES for index in range(count)]
        write_parquet(
            root / f"{split}.parquet", labels, images=images, names=[f"c{i}" for i in range(CLASSES)]
        )


def data_of(spec: str, recipe: str, root: Path) -> str:
    """Small data of the kind that a recipe names."""
    kind = spec.partition(":")[0]
    if kind == "digits":
        return spec
    if kind == "imagefolder":
        (write_tiny_imagenet if recipe.startswith("tiny-imagenet") else write_imagenet)(root)
    elif kind == "parquet":
        write_cifar_parquet(root)
    elif kind == "cifar10":
        write_python10(root)
    return f"{kind}:{root}"


def shrunken(values: Mapping[str, Any], data: str, folder: Path) -> dict[str, Any]:
    """The same settings, epochs too, on small batches in a narrow network, each of them a step."""
    small = {**values, "data": data, "batch_size": BATCH, "width": 0.125, "threads": 1, "workers": 0}
    small |= {"cache_dir": str(folder / "cache"), "operators": "reference"}
    small |= {"accumulate": 1}  # an epoch of a few images is then not one step
    if "holdout" in values:
        small["holdout"] = CLASSES
    return small


class Stopped(BaseException):
    """Ends a run that has begun well."""


class StopAfterTwo(Silent):
    """Ends a run after two steps."""

    def step(self, info: StepProgress) -> None:
        assert math.isfinite(info.loss)
        if info.step == 2:
            raise Stopped


def start(settings: Mapping[str, Any], folder: Path) -> None:
    with pytest.raises(Stopped):
        fit(*from_dict(settings), folder, progress=StopAfterTwo())


def names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("frontier-"))


@pytest.mark.parametrize("name", names())
def test_a_recipe_starts(name: str, tmp_path: Path) -> None:
    values = read_settings(RECIPES / f"{name}.yaml")
    start(shrunken(values, data_of(values["data"], name, tmp_path / "data"), tmp_path), tmp_path / "run")


@pytest.mark.parametrize("name", ["imagenet-campfire", "tiny-imagenet-campfire"])
def test_both_imagenets_have_the_transforms_and_the_stem(name: str, tmp_path: Path) -> None:
    """Campfire B.1, B.2: a random sized crop to 224x224, mirrored at random, in both."""
    values = read_settings(RECIPES / f"{name}.yaml")
    settings = shrunken(values, data_of(values["data"], name, tmp_path / "data"), tmp_path)
    prepared = prepare(*from_dict(settings))
    assert prepared.data.image_shape == (3, 224, 224)
    assert prepared.facts["stem"] == "imagenet"
    evaluated = make_eval_loader(prepared.config, prepared.data, "val", torch.device("cpu"))
    shapes = [tuple(image.shape) for x, _ in evaluated.epoch(0) for image in x]
    assert shapes == [(3, 224, 224)] * 4, "also of images of several sizes"
    assert augmentation(prepared.config, prepared.data) == Augment(resized_crop=True, flip=True)


FRONTIERS = {
    f"{path.stem}-{cell.setting or cell.kind}": (path, cell.name)
    for path in sorted(RECIPES.glob("frontier-*.yaml"))
    for cell in reversed(read_recipe(path).cells)
}
"""One cell of each setting of each frontier: the first."""


@pytest.mark.parametrize("name", FRONTIERS)
def test_a_frontier_starts(name: str, tmp_path: Path) -> None:
    path, cell = FRONTIERS[name]
    values = dict(read_recipe(path).cell(cell).settings)
    start(shrunken(values, data_of(values["data"], name, tmp_path / "data"), tmp_path), tmp_path / "run")
