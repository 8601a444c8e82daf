"""Transformers' Trainer with the callback does what an own loop does, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clicktrain
from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain, PaT, RigL

transformers = pytest.importorskip("transformers", reason="pip install 'clicktrain[transformers]'")
pytest.importorskip("accelerate", reason="pip install 'clicktrain[transformers]'")

from clicktrain.integrations.transformers import STATE, PruningCallback  # noqa: E402

EPOCHS, BATCHES, IMAGES = 6, 4, 8
METHODS: dict[str, Any] = {
    "clicktrain": lambda: ClickTrain(compression=2),
    "rigl": lambda: RigL(sparsity=0.6, interval=3, linear=False),
}


pytestmark = pytest.mark.filterwarnings("ignore")  # advice about workers, loggers and batch sizes


def network() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def images() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 3, (IMAGES * BATCHES,), generator=generator)
    x = torch.randn(len(y), 3, 16, 16, generator=generator) + y.view(-1, 1, 1, 1)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(x, y, strict=True)]


class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(images())


def trainer(folder: Path, model: Any, *callbacks: Any, **more: Any) -> Any:
    settings = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": IMAGES, "learning_rate": 0.01,
        "use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "optim": "adamw_torch", "logging_strategy": "no", **more,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **settings)
    return InOrder(model, arguments, train_dataset=images(), eval_dataset=images(), callbacks=list(callbacks))


def own_loop(method: Any) -> dict[str, Tensor]:
    model = network()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if p.dim() > 1], "weight_decay": 0.0},
            {"params": [p for n, p in model.named_parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    pruner = method.attach(model, optimizer, epochs=EPOCHS, steps_per_epoch=BATCHES, packed=True)
    model.train()
    for _ in range(EPOCHS):
        for start in range(0, IMAGES * BATCHES, IMAGES):
            batch = images()[start : start + IMAGES]
            loss = model(
                pixel_values=torch.stack([one["pixel_values"] for one in batch]),
                labels=torch.tensor([one["labels"] for one in batch]),
            ).loss
            loss.backward()
            pruner.observe(loss)
            optimizer.step()
            optimizer.zero_grad()
    return dict(pruner.finish().state_dict())


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_loop_of_ones_own(method: str, tmp_path: Path) -> None:
    model, pruning = network(), PruningCallback(METHODS[method]())
    trainer(tmp_path, model, pruning).train()
    assert pruning.pruner is not None
    assert pruning.pruner.progress.seen == EPOCHS * BATCHES
    own = own_loop(METHODS[method]())
    if method == "clicktrain":
        assert_same(dict(model.state_dict()), own, 1e-5)
    else:  # the Trainer's loss is a sum over a number of images: rounding moves other weights
        kept = {name: int(value.count_nonzero()) for name, value in own.items() if value.dim() == 4}
        assert {name: int(model.state_dict()[name].count_nonzero()) for name in kept} == kept


def test_one_observation_for_each_step_of_several_batches(tmp_path: Path) -> None:
    """The same images in half as many at a time: the loss of a step is the same."""
    seen = []
    for more in ({}, {"per_device_train_batch_size": IMAGES // 2, "gradient_accumulation_steps": 2}):
        pruning = PruningCallback(RigL(sparsity=0.6, interval=3, linear=False))
        trainer(tmp_path, network(), pruning, **more).train()
        assert pruning.pruner is not None
        assert pruning.pruner.progress.seen == EPOCHS * BATCHES
        seen.append(float(pruning.pruner.progress.first_loss))
    assert seen[0] == pytest.approx(seen[1], rel=0.3)  # batch norms see half as many images


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_a_checkpoint(method: str, tmp_path: Path) -> None:
    whole, pruning = network(), PruningCallback(METHODS[method]())
    more: dict[str, Any] = {"save_strategy": "epoch"}
    trainer(tmp_path, whole, pruning, **more).train()
    folder = tmp_path / f"checkpoint-{5 * BATCHES}"
    assert (folder / STATE).exists()
    plain = transformers.ResNetForImageClassification.from_pretrained(folder)
    assert clicktrain.compression_ratio(plain) > 1.3
    again, pruning = network(), PruningCallback(METHODS[method]())
    nn.init.zeros_(again.classifier[1].weight)
    trainer(tmp_path, again, pruning, **more).train(resume_from_checkpoint=str(folder))
    assert pruning.pruner is not None
    assert pruning.pruner.progress.seen == EPOCHS * BATCHES
    assert_same(dict(again.state_dict()), dict(whole.state_dict()), 1e-5)


def test_channels(tmp_path: Path) -> None:
    method = PaT(policy="epoch", prune_epoch=1, prune_ratio=0.3)
    with pytest.raises(UserError, match="give example, as"):
        trainer(tmp_path, network(), PruningCallback(method)).train()
    model = network()
    before = sum(p.numel() for p in model.parameters())
    example = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    trainer(tmp_path, model, PruningCallback(method, example=example)).train()
    assert sum(p.numel() for p in model.parameters()) < 0.9 * before


def test_the_best_model_is_a_pruned_one(tmp_path: Path) -> None:
    """The loss rises when weights are pruned; the best is looked for afterwards all the same."""
    model, pruning = network(), PruningCallback(ClickTrain(compression=3))
    more = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True,
            "metric_for_best_model": "step", "greater_is_better": False}  # fmt: skip
    steps = iter(range(100))
    made = trainer(tmp_path, model, pruning, **more)
    made.compute_metrics = lambda _: {"step": next(steps)}
    made.train()
    assert clicktrain.compression_ratio(model) == pytest.approx(3, rel=0.05)


def test_a_loss_outside_of_the_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the network returned no loss in training"):
        trainer(
            tmp_path, network(), PruningCallback(METHODS["clicktrain"]()), label_smoothing_factor=0.1
        ).train()
