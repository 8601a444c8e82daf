"""``clicktrain models``: networks by name, their sizes and what an image costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from clicktrain.commands.arguments import JSON, Command, Option, Positional
from clicktrain.errors import UserError, shortened
from clicktrain.wording import short, table_lines

_OPTIONS = (
    Option("image_size", int, "Side of the images in pixels: up to 64 get the CIFAR stem.", 32, metavar="N"),
    Option("classes", int, "Classes of the data set.", 10, metavar="N"),
    Option("width", float, "Factor on the number of filters in every layer.", 1.0, metavar="X"),
    JSON,
)
MOST_COUNTED = 40
"""Networks of packages that are counted; of more, names are listed."""
COMMAND = Command(
    name="models",
    description="The networks that --model names: parameters, layers and FLOPs of a forward pass of one "
    "image. The zoo's are counted on shapes alone: no weights are made.",
    positional=Positional(
        "names",
        "Pattern of names, as resnet*, timm:resnet* or torchvision:*; the zoo by default. Of more than "
        f"{MOST_COUNTED} networks of a package only the names are listed.",
        optional=True,
    ),
    groups={"this command": _OPTIONS},
    examples=("clicktrain models", "clicktrain models 'resnet*' --image-size 224 --classes 1000 --json"),
    footer="A network of your own is --model package.module:factory (docs/inputs.md).",
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in _OPTIONS} | COMMAND.parse(argv)
    from clicktrain.models.registry import check_numbers

    check_numbers(given["classes"], 3, given["width"])
    if not 1 <= given["image_size"] <= 8192:
        raise UserError(f"image_size is {given['image_size']}: 1 to 8192 are possible")
    names = matching(given.get("names"))
    if given.get("names") and ":" in given["names"] and len(names) > MOST_COUNTED:
        print(json.dumps(names, indent=2) if given["json"] else "\n".join(names))
        return 0
    rows = describe(given["image_size"], given["classes"], given["width"], names)
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


def matching(pattern: str | None) -> list[str]:
    """The names that a pattern with ``*`` and ``?`` matches; those of the zoo without one."""
    from clicktrain.models.packages import in_package, list_package_models
    from clicktrain.models.registry import list_models

    if pattern is None:
        return list(list_models())
    package = pattern.partition(":")[0]
    known = list_package_models(package) if in_package(pattern) else list_models()
    names = [name for name in known if fnmatchcase(name, pattern)]
    if not names:
        raise UserError(f"no network is called {pattern!r}: try 'resnet*', 'timm:*' or 'torchvision:*'")
    return names


def describe(
    image_size: int, classes: int, width: float, names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """A record for each network, of the zoo by default; ``reason`` where it does not take such images."""
    import torch

    from clicktrain.accounting import count
    from clicktrain.models.packages import in_package
    from clicktrain.models.registry import create_model, list_models, min_image_size
    from clicktrain.train.augmentation import SMALL_IMAGE

    stem, rows = "cifar" if image_size <= SMALL_IMAGE else "imagenet", []
    sizes: dict[str, Any] = {"num_classes": classes, "stem": stem, "image_size": image_size}
    for name in list_models() if names is None else names:
        row: dict[str, Any] = {"name": name, "stem": stem, "parameters": None, "convolutions": None,
                               "forward_flops": None, "min_image_size": min_image_size(name, stem),
                               "reason": None}  # fmt: skip
        rows.append(row)
        if image_size < row["min_image_size"]:
            row["reason"] = f"needs images of at least {row['min_image_size']} pixels"
            continue
        try:
            if in_package(name):
                row["stem"] = None
                model = create_model(name, width=width, **sizes).eval()
                cost = count(model, torch.zeros(1, 3, image_size, image_size), {})
            else:
                with torch.device("meta"):  # shapes alone, no memory
                    model = create_model(name, width=width, **sizes)
                    cost = count(model, torch.zeros(1, 3, image_size, image_size), {})
        except (UserError, RuntimeError, AssertionError, ValueError) as error:
            if not in_package(name):
                raise
            row["reason"] = shortened(str(error).partition("\n")[0], 90)
            continue
        convolutions = sum(len(layer.weight_shape) == 4 for layer in cost.layers)
        row |= {"parameters": cost.parameters, "convolutions": convolutions,
                "forward_flops": cost.forward_flops_dense}  # fmt: skip
    return rows
