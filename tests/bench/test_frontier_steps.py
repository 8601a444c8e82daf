"""Steps that are timed are the trainer's, on networks that look like those of the runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from clicktrain.bench.frontier.lines import Line
from clicktrain.bench.frontier.networks import Engine, dense_network, pruned_network
from clicktrain.bench.frontier.recipe import parse_recipe
from clicktrain.bench.frontier.structure import density_of, describe_masks
from clicktrain.bench.frontier.trainer_steps import ENDLESS, TrainerSteps, drawn_images
from clicktrain.bench.masks import model_masks
from clicktrain.errors import UserError
from clicktrain.methods import Dense
from clicktrain.models import create_model

RECIPE = parse_recipe(
    {
        "base": {"model": "resnet20", "data": "digits", "batch_size": 8, "learning_rate": 3.0},
        "dense": {"width": 0.25, "epochs": [3, 5]},
        "pruned": {
            "method": "clicktrain", "setting": "cut", "width": 0.25, "epochs": 5,
            "settings": {"packed": False, "distill": 0.5},
        },
    },
    "tiny",
)  # fmt: skip
FACTS = {"classes": 10, "image_shape": [1, 8, 8], "channels_removed": False}


def line(name: str) -> Line:
    model = create_model("resnet20", num_classes=10, in_channels=1, width=0.25, stem="cifar")
    masks = model_masks(model, 4.0, 1)
    return {"name": name, "seed": 0, "network": FACTS, "structure": describe_masks(masks), "rule": "sparse"}


def test_the_network_of_a_run_is_rebuilt_from_its_line() -> None:
    own = line("cut-w0.25-e5")
    network = pruned_network(RECIPE.cell("cut-w0.25-e5"), own)
    assert network.config.operators == "sparse"
    assert describe_masks(network.masks) == own["structure"]
    weights = dict(network.module().named_modules())
    for name, mask in network.masks.items():
        weight = weights[name].weight
        assert isinstance(weight, torch.Tensor)
        assert int(weight.count_nonzero()) == int(mask.sum())
    steps = network.steps(Engine())
    assert steps.frozen
    assert steps.density == pytest.approx(density_of(own["structure"]), abs=0.01)  # and of the first layer
    assert steps.run.active_teacher is not None  # the run learns from its dense network
    before = steps.run.state.step
    for _ in range(6):
        steps.step()
    steps.evaluate()
    assert steps.run.state.step == before + 6
    assert steps.run.prepared.model.training
    steps.close()


def test_dense_runs_of_any_length_share_a_network() -> None:
    three, five, cut = (
        dense_network(RECIPE.cell(name), line(name))
        for name in ("dense-w0.25-e3", "dense-w0.25-e5", "cut-w0.25-e5")
    )
    assert three.key == five.key == cut.key
    assert three.key.startswith("resnet20 w0.25 b8 ")
    other = replace(RECIPE.cell("dense-w0.25-e3"), settings={**RECIPE.cells[0].settings, "batch_size": 16})
    assert dense_network(other, line("dense-w0.25-e3")).key != three.key


def test_images_are_drawn_in_the_sizes_of_the_run_and_changed_as_its_are() -> None:
    config, _ = RECIPE.cell("dense-w0.25-e3").config(0)
    drawn = drawn_images(config, FACTS, 3)
    steps = TrainerSteps(drawn, Dense())
    prepared = steps.run.prepared
    assert prepared.data.image_shape == (1, 8, 8)
    assert (len(prepared.train_loader), len(prepared.val_loader), len(prepared.data.classes)) == (3, 1, 10)
    assert (drawn.augment, prepared.config.epochs) == ("digits", ENDLESS)
    for _ in range(4):
        steps.step()
    assert (steps.run.state.epoch, steps.run.state.batch) == (1, 1)
    steps.close()
    wide: dict[str, Any] = {**FACTS, "image_shape": [1, 8, 10]}
    with pytest.raises(UserError, match="images of 8x10 cannot be timed"):
        drawn_images(config, wide, 3)
