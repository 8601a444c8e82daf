"""``clicktrain evaluate RUN``: accuracy and loss of a finished run, on its own or other data, or attacked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from clicktrain.commands.arguments import JSON, OWN_MODEL, RUN, Command, Option
from clicktrain.errors import UserError

if TYPE_CHECKING:
    import torch

    from clicktrain.data import ImageData, Loader
    from clicktrain.train import LoadedRun, RunConfig
    from clicktrain.train.evaluate import Attack

COMMAND = Command(
    name="evaluate",
    description="Accuracy and loss of a finished run on validation or test images, or under attack.",
    examples=(
        "clicktrain evaluate runs/first",
        "clicktrain evaluate runs/first --attack fgsm --epsilon 0.05 0.1",
        "clicktrain evaluate runs/first --data imagefolder:photos --json",
    ),
    positional=RUN,
    groups={
        "this command": (
            OWN_MODEL,
            Option("data", str | None, "Other images than the run's own, as for train.", metavar="SPEC"),
            Option("split", Literal["val", "test"],
                   "The validation images, or the test split of a run with --holdout.", "val"),
            Option("batch_size", int | None, "Images per forward pass; as in training by default."),
            Option("device", str | None, "auto, cpu, cuda or mps; as in training by default."),
            Option("tta", Literal["none", "flip", "shift"] | None,
                   "Average the outputs over views of each image: flip (the image and its mirror image) or "
                   "shift (also both shifted by a pixel, to two sides); as in training by default."),
            JSON,
        ),
        "adversarial attack": (
            Option("attack", Literal["fgsm", "pgd"] | None, "Attack images by the network's gradients."),
            Option("epsilon", tuple[float, ...] | None,
                   "Largest change of a pixel in 0 to 1; one accuracy each. 0.05 to 0.3 by default."),
            Option("steps", int | None, "Gradient steps of pgd; 10 by default."),
        ),
    },
)  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = COMMAND.parse(argv)
    from clicktrain.train import load_run
    from clicktrain.train.evaluate import save_robustness

    loaded = load_run(given["run"], given.get("model"))
    names = [name for name in ("data", "batch_size", "device") if given.get(name) is not None]
    config = replace(loaded.config, **{name: given[name] for name in names})
    attacks = _attacks(given, config.seed)
    if given.get("tta") is not None:
        config = replace(config, test_time_augmentation=given["tta"])
    if attacks and config.test_time_augmentation != "none":
        raise UserError("attacks are made on images as they are: add --tta none")
    split: Literal["val", "test"] = given.get("split") or "val"
    result = _evaluate(loaded, config, attacks, split)
    if attacks and config.data == loaded.config.data and split == "val":
        save_robustness(loaded.folder, attacks, [row["accuracy"] for row in result["robustness"]])
    if given.get("json"):
        print(json.dumps(result, indent=2))
        return 0
    top5 = "" if result["top5_accuracy"] is None else f", top-5 {result['top5_accuracy']:.2f}%"
    views = f", test-time augmentation {config.test_time_augmentation}" * ("test_time_augmentation" in result)
    print(
        f"{result['run']}: accuracy {result[f'{split}_accuracy']:.2f}%{top5}, "
        f"loss {result[f'{split}_loss']:.4f} on {result['images']} images of {result['data']}{views}"
    )
    for row in result.get("robustness", ()):
        print(f"under {result['attack']}, epsilon {row['epsilon']:g}: accuracy {row['accuracy']:.2f}%")
    return 0


def _attacks(given: Mapping[str, Any], seed: int) -> list[Attack]:
    """The attacks that are asked for; UserError for flags that do not fit together."""
    from clicktrain.train.evaluate import PAPER_EPSILONS, Attack

    name, steps = given.get("attack"), given.get("steps")
    if name is None:
        for flag in ("epsilon", "steps"):
            if given.get(flag) is not None:
                raise UserError(f"--{flag} belongs to an attack: add --attack fgsm or --attack pgd")
        return []
    if steps is not None and name != "pgd":
        raise UserError(f"--steps belongs to --attack pgd: {name} takes one step")
    epsilons = given.get("epsilon") or PAPER_EPSILONS
    return [Attack(name, epsilon, 10 if steps is None else steps, seed) for epsilon in epsilons]


def _evaluate(
    loaded: LoadedRun, config: RunConfig, attacks: Sequence[Attack], split: Literal["val", "test"]
) -> dict[str, Any]:
    from clicktrain.train.device import resolve_device, set_up
    from clicktrain.train.evaluate import attacked_accuracy, evaluate

    device = resolve_device(config.device)
    set_up(config, device)
    data, loader = images_of_run(loaded, config, split, device)
    model = loaded.model.to(device)
    views = config.test_time_augmentation
    result = evaluate(model, loader, device=device, precision=config.precision, views=views)
    assert result is not None  # only a stop that is asked for gives none
    report = {
        "run": str(loaded.folder.path),
        "data": config.data,
        "images": result.images,
        f"{split}_accuracy": result.accuracy,
        "top5_accuracy": result.top5_accuracy,
        f"{split}_loss": result.loss,
        "compression_ratio": loaded.summary["compression_ratio"],
    }
    if views != "none":
        report["test_time_augmentation"] = views
    if attacks:
        accuracies = attacked_accuracy(
            model, loader, attacks, mean=data.mean, std=data.std, device=device, precision=config.precision
        )
        report["attack"] = attacks[0].name
        pairs = zip(attacks, accuracies, strict=True)
        report["robustness"] = [{"epsilon": attack.epsilon, "accuracy": share} for attack, share in pairs]
    return report


def images_of_run(
    loaded: LoadedRun, config: RunConfig, split: Literal["val", "test"], device: torch.device
) -> tuple[ImageData, Loader]:
    """The images that settings name, as the network of a run is used to see them, and batches of a split.

    Raises:
        UserError: there are no such images, or they do not fit the network.
    """
    from clicktrain.train.prepare import make_eval_loader, open_run_data

    if config.data != loaded.config.data:
        _, height, width = loaded.image_shape
        config = replace(
            config, image_size=height if height == width else None, holdout=None, shuffle_buffer=None
        )
    data = _fitting(loaded, open_run_data(config, loaded.value_range), config.data)
    return data, make_eval_loader(config, data, split, device)


def _fitting(loaded: LoadedRun, data: ImageData, spec: str) -> ImageData:
    """The data as the network is used to see it: normalized as in training; UserError if it does not fit."""
    if tuple(data.image_shape) != loaded.image_shape:
        has, needs = ("x".join(map(str, shape)) for shape in (data.image_shape, loaded.image_shape))
        raise UserError(
            f"the images of {spec} are {has} (channels, height, width): the network takes {needs}"
        )
    classes = list(loaded.facts["classes"])
    if list(data.classes) != classes:
        raise UserError(
            f"{spec} has {len(data.classes)} classes ({_some(data.classes)}): the network was trained on "
            f"{len(classes)} ({_some(classes)})"
        )
    return replace(data, mean=tuple(loaded.facts["mean"]), std=tuple(loaded.facts["std"]))


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
