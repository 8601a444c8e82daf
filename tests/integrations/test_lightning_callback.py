"""Lightning's Trainer with the callback does what an own loop does, and goes on where it was stopped."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import clicktrain
from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain, Method, PaT, RigL

pl = pytest.importorskip("pytorch_lightning", reason="pip install 'clicktrain[lightning]'")

from clicktrain.integrations.lightning import PruningCallback, load_checkpoint_  # noqa: E402

EPOCHS, BATCHES = 6, 4
METHODS: dict[str, Any] = {
    "clicktrain": lambda: ClickTrain(compression=3),
    "rigl": lambda: RigL(sparsity=0.6, interval=3, linear=False),
    "pat": lambda: PaT(policy="epoch", prune_epoch=1, prune_ratio=0.4),
}
EXAMPLE = torch.zeros(2, 3, 6, 6)


pytestmark = pytest.mark.filterwarnings("ignore")  # advice about workers, loggers and batch sizes


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(0, 3, (8 * BATCHES,), generator=generator)
    x = torch.randn(len(y), 3, 6, 6, generator=generator) + y.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(x, y), 8)


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.net = network()
        self.automatic_optimization = not manual

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("level", loss, on_epoch=True)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.net)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def trainer(folder: Path, *callbacks: Any, epochs: int = EPOCHS, **more: Any) -> Any:
    settings = {
        "max_epochs": epochs, "accelerator": "cpu", "devices": 1, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "default_root_dir": folder, **more,
    }  # fmt: skip
    return pl.Trainer(callbacks=list(callbacks), **settings)


def callback(method: str, **more: Any) -> PruningCallback:
    return PruningCallback(METHODS[method](), example=EXAMPLE, **more)


def own_loop(method: Method[Any], accumulate: int = 1, clip: float | None = None) -> dict[str, Tensor]:
    model = network()
    optimizer = sgd(model)
    pruner = method.attach(
        model, optimizer, epochs=EPOCHS, steps_per_epoch=BATCHES, packed=True, example=EXAMPLE
    )
    for _ in range(EPOCHS):
        for index, (x, y) in enumerate(loader()):
            loss = F.cross_entropy(model(x), y)
            (loss / accumulate).backward()
            pruner.observe(loss)
            pruner.mask_gradients()
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return dict(pruner.finish().state_dict())


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_loop_of_ones_own(method: str, manual: bool, tmp_path: Path) -> None:
    module, pruning = Module(manual), callback(method)
    trainer(tmp_path, pruning).fit(module, loader())
    assert pruning.pruner is not None
    assert pruning.pruner.progress.seen == EPOCHS * BATCHES
    assert_same(dict(module.net.state_dict()), own_loop(METHODS[method]()))
    assert not {"on_load_checkpoint", "on_save_checkpoint"} & vars(module).keys()


def test_accumulated_and_clipped_gradients(tmp_path: Path) -> None:
    module = Module()
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    trainer(tmp_path, callback("clicktrain"), **settings).fit(module, loader())
    assert_same(dict(module.net.state_dict()), own_loop(METHODS["clicktrain"](), 2, 0.5))


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_a_checkpoint(method: str, at: int, tmp_path: Path) -> None:
    class Stop(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch + 1 == at:
                trainer.save_checkpoint(tmp_path / "some.ckpt")

    whole = Module()
    trainer(tmp_path, callback(method), Stop()).fit(whole, loader())
    again, pruning = Module(), callback(method)
    nn.init.zeros_(again.net[3].weight)
    trainer(tmp_path, pruning).fit(again, loader(), ckpt_path=tmp_path / "some.ckpt")
    assert pruning.pruner is not None
    assert pruning.pruner.progress.seen == EPOCHS * BATCHES
    assert_same(dict(again.net.state_dict()), dict(whole.net.state_dict()))


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_hold_the_plain_network(method: str, tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "last", save_weights_only=True)
    module = Module()
    trainer(tmp_path, callback(method), saving, enable_checkpointing=True).fit(module, loader())
    fresh = Module()
    load_checkpoint_(fresh, torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert_same(dict(fresh.state_dict()), dict(module.state_dict()))
    if method != "pat":
        loaded = Module.load_from_checkpoint(tmp_path / "last.ckpt")
        assert clicktrain.compression_ratio(loaded.net) > 1.5


def test_the_best_checkpoint_is_of_a_pruned_network(tmp_path: Path) -> None:
    """A metric that only gets worse: the best would be that of the first epoch, before anything is pruned."""

    class Worse(Module):
        def on_train_epoch_end(self) -> None:
            self.log("worse", float(self.current_epoch))

    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="worse", mode="min")
    pruning = callback("clicktrain")
    trainer(tmp_path, pruning, best, enable_checkpointing=True).fit(Worse(), loader())
    assert pruning.pruner is not None
    frozen = next(e["epoch"] for e in pruning.pruner.events if e["event"] == "hard_prune")
    loaded = torch.load(best.best_model_path, weights_only=True)
    assert loaded["epoch"] >= int(frozen) > 0


def test_a_part_of_the_module(tmp_path: Path) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(3, 3)

    module = Two()
    pruning = callback("clicktrain", network="net")
    trainer(tmp_path, pruning).fit(module, loader())
    assert pruning.pruner is not None
    assert pruning.pruner.model is module.net
    with pytest.raises(UserError, match="no part of the LightningModule"):
        trainer(tmp_path, callback("clicktrain", network=network())).fit(Two(), loader())


def test_a_run_without_an_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the length of the run is not known"):
        trainer(tmp_path, callback("clicktrain"), epochs=-1).fit(Module(), loader())


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    plain = trainer(tmp_path, epochs=1)
    plain.fit(Module(), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(UserError, match="holds no pruning to go on with"):
        trainer(tmp_path, callback("clicktrain")).fit(Module(), loader(), ckpt_path=tmp_path / "plain.ckpt")


def test_a_run_that_fails_leaves_the_network_free(tmp_path: Path) -> None:
    class Broken(Module):
        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            if self.current_epoch == 1:
                raise OSError("the disk is gone")
            return super().training_step(batch, index)

    module = Broken()
    with pytest.raises(OSError, match="disk"):
        trainer(tmp_path, callback("clicktrain")).fit(module, loader())
    METHODS["clicktrain"]().attach(module.net, sgd(module.net), epochs=6, steps_per_epoch=4).close()


@pytest.mark.long
def test_the_other_package(tmp_path: Path) -> None:
    """``lightning.pytorch`` has classes of its own."""
    other = pytest.importorskip("lightning.pytorch")
    from clicktrain.integrations import lightning, lightning_package

    importlib.reload(lightning_package)
    callback_class = importlib.reload(lightning).PruningCallback

    class Ours(other.LightningModule):  # type: ignore[misc, name-defined]
        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.net = network()

    module = Ours()
    pruning = callback_class(METHODS["clicktrain"]())
    other.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, default_root_dir=tmp_path, callbacks=[pruning],
    ).fit(module, loader())  # fmt: skip
    assert_same(dict(module.net.state_dict()), own_loop(METHODS["clicktrain"]()))
