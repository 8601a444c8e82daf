"""``clicktrain models``: the networks of the zoo, their sizes and what an image costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from clicktrain.commands.arguments import JSON, Command, Option
from clicktrain.errors import UserError
from clicktrain.wording import short, table_lines

_OPTIONS = (
    Option("image_size", int, "Side of the images in pixels: up to 64 get the CIFAR stem.", 32, metavar="N"),
    Option("classes", int, "Classes of the data set.", 10, metavar="N"),
    Option("width", float, "Factor on the number of filters in every layer.", 1.0, metavar="X"),
    JSON,
)
COMMAND = Command(
    name="models",
    description="The networks that --model names: parameters, layers and FLOPs of a forward pass of one "
    "image. Counted on shapes alone: no weights are made.",
    groups={"this command": _OPTIONS},
    examples=("clicktrain models", "clicktrain models --image-size 224 --classes 1000 --json"),
    footer="A network of your own is --model package.module:factory (docs/inputs.md).",
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in _OPTIONS} | COMMAND.parse(argv)
    from clicktrain.models.registry import check_numbers

    check_numbers(given["classes"], 3, given["width"])
    if not 1 <= given["image_size"] <= 8192:
        raise UserError(f"image_size is {given['image_size']}: 1 to 8192 are possible")
    rows = describe(given["image_size"], given["classes"], given["width"])
    if given["json"]:
        print(json.dumps(rows, indent=2))
        return 0
    head = ["model", "parameters", "convolutions", "FLOPs per image"]
    cells = [
        [row["name"], f"{row['parameters']:,}", str(row["convolutions"]), short(row["forward_flops"], " ")]
        if row["reason"] is None
        else [row["name"], "-", "-", row["reason"]]
        for row in rows
    ]
    size = given["image_size"]
    print(f"{given['classes']} classes, images of 3x{size}x{size}, width {given['width']:g}\n")
    print("\n".join(table_lines([head, *cells])))
    return 0


def describe(image_size: int, classes: int, width: float) -> list[dict[str, Any]]:
    """A record for each network, ``reason`` where it does not take such images."""
    import torch

    from clicktrain.accounting import count
    from clicktrain.models.registry import create_model, list_models, min_image_size
    from clicktrain.train.augmentation import SMALL_IMAGE

    stem, rows = "cifar" if image_size <= SMALL_IMAGE else "imagenet", []
    for name in list_models():
        row: dict[str, Any] = {"name": name, "stem": stem, "parameters": None, "convolutions": None,
                               "forward_flops": None, "min_image_size": min_image_size(name, stem),
                               "reason": None}  # fmt: skip
        if image_size < row["min_image_size"]:
            row["reason"] = f"needs images of at least {row['min_image_size']} pixels"
        else:
            with torch.device("meta"):  # shapes alone, no memory
                model = create_model(name, num_classes=classes, width=width, stem=stem)
                cost = count(model, torch.zeros(1, 3, image_size, image_size), {})
            convolutions = sum(len(layer.weight_shape) == 4 for layer in cost.layers)
            row |= {"parameters": cost.parameters, "convolutions": convolutions,
                    "forward_flops": cost.forward_flops_dense}  # fmt: skip
        rows.append(row)
    return rows
