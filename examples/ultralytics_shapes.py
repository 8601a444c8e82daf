"""A YOLO detector by Ultralytics, pruned while it trains, and exported.

    python examples/ultralytics_shapes.py

Finds bright squares and disks in generated images of 64x64 pixels: a small YOLOv8, 70% of its weights pruned
by RigL, in a minute on a CPU. The package's own YAML files (``YOLO("yolo11n.yaml")``) and weights work alike.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("YOLO_OFFLINE", "true")  # generated data, weights from scratch: nothing to fetch
os.environ.setdefault("YOLO_AUTOINSTALL", "false")

import torch
import yaml
from PIL import Image, ImageDraw
from torch import nn
from ultralytics import YOLO

import clicktrain
from clicktrain.integrations.ultralytics import pruned_trainer

EPOCHS, SIDE, IMAGES = 12, 64, {"train": 96, "val": 32}
NETWORK = {
    "nc": 2,
    "scales": {"n": [0.33, 0.125, 512]},
    "backbone": [
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "C2f", [128, True]],
        [-1, 1, "Conv", [256, 3, 2]],
        [-1, 3, "C2f", [256, True]],
        [-1, 1, "Conv", [512, 3, 2]],
        [-1, 1, "SPPF", [512, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [[-1, 4], 1, "Concat", [1]],
        [-1, 3, "C2f", [256]],
        [[9, 6], 1, "Detect", ["nc"]],
    ],
}
"""Ultralytics' own format: from, repeats, module, arguments. Strides 8 and 16."""


def draw(folder: Path) -> Path:
    """Images and labels as Ultralytics reads them; the path of their YAML file."""
    chance = random.Random(0)
    for split, number in IMAGES.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(number):
            image = Image.new("RGB", (SIDE, SIDE), tuple(chance.randrange(60) for _ in range(3)))
            brush, lines = ImageDraw.Draw(image), []
            for _ in range(chance.randint(1, 2)):
                shape, side = chance.randrange(2), chance.randint(14, 28)
                x, y = (chance.randrange(SIDE - side) for _ in range(2))
                color = tuple(chance.randrange(150, 256) for _ in range(3))
                (brush.ellipse if shape else brush.rectangle)((x, y, x + side, y + side), fill=color)
                middle = [(v + side / 2) / SIDE for v in (x, y)]
                lines.append(" ".join(map(str, [shape, *middle, side / SIDE, side / SIDE])))
            image.save(folder / "images" / split / f"{index}.png")
            (folder / "labels" / split / f"{index}.txt").write_text("\n".join(lines))
    data = folder / "data.yaml"
    names = {0: "square", 1: "disk"}
    splits = {split: f"images/{split}" for split in IMAGES}
    data.write_text(yaml.safe_dump({"path": str(folder), **splits, "names": names}))
    return data


def main(epochs: int = EPOCHS) -> nn.Module:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, network = draw(folder), folder / "yolov8n-shapes.yaml"
        network.write_text(yaml.safe_dump(NETWORK))
        yolo = YOLO(network, task="detect")
        yolo.train(
            data=str(data),
            epochs=epochs,
            imgsz=SIDE,
            batch=16,
            nbs=16,
            lr0=0.01,
            optimizer="AdamW",
            warmup_epochs=1,
            mosaic=0.0,
            device="cpu",
            workers=0,
            plots=False,
            verbose=False,
            project=str(folder),
            name="run",
            trainer=pruned_trainer(yolo, clicktrain.RigL(sparsity=0.7)),  # the line
        )
        found = yolo.val(data=str(data), imgsz=SIDE, device="cpu", plots=False, verbose=False, workers=0)
        exported = yolo.export(format="torchscript", imgsz=SIDE, device="cpu")
        size = Path(exported).stat().st_size
        detector: nn.Module = yolo.model
    print(
        f"mAP50 {found.box.map50:.2f}  compression {clicktrain.compression_ratio(detector):.2f}x  "
        f"exported {size / 1e6:.1f} MB"
    )
    return detector


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
