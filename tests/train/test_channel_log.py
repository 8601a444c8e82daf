"""channels.jsonl: the largest weight of every channel, by its number in the network as it was at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import At, Killed, assert_same_run, kill, resume, run
from torch import Tensor, nn

from clicktrain import create_model
from clicktrain.methods.driver.publisher import EpochEnd
from clicktrain.sparsity.channel_lasso import ChannelAxis
from clicktrain.surgery import Cut, SurgeryPlan, apply_surgery_, original_channels, renumbered
from clicktrain.train import RunFolder, Silent, from_dict
from clicktrain.train.channel_log import watch_channels
from clicktrain.train.epoch import end_epoch, train_epoch
from clicktrain.train.interrupt import StopRequest
from clicktrain.train.prepare import prepare
from clicktrain.train.training_run import TrainingRun

EPOCHS = 5
SETTINGS: dict[str, Any] = {
    "model": "resnet8",
    "width": 0.5,
    "data": "synthetic:classes=3,size=8,channels=1,train=128,val=16",
    "batch_size": 32,
    "learning_rate": 0.1,
    "method": "prunetrain",
    "coefficient": 0.085,
    "interval": 2,
    "epochs": EPOCHS,
    "threads": 1,
}
BATCHES = 4
"""Per epoch."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run(path, SETTINGS)
    return path


class Watched:
    """A run with copies of what was in the network when each line was written, and numbered weights."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        config, method = from_dict(settings)
        prepared = prepare(config, method)
        live = TrainingRun(prepared, RunFolder(path), Silent())
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.numbered: dict[int, dict[str, Tensor]] = {}
        self.pruner = prepared.pruner
        watch_channels(live)
        self.pruner.subscribe(lambda end: self._look(end.epoch), EpochEnd)
        live.begin()
        with StopRequest() as stop:
            while live.state.epoch < config.epochs:
                train_epoch(live, stop)
                end_epoch(live, stop)
        self.pruner.finish()
        self.lines = RunFolder(path).read_channels()

    def _look(self, epoch: int) -> None:
        state = self.pruner.model.state_dict()
        self.weights[epoch] = {n: w.clone() for n, w in state.items() if w.dim() == 4}
        shadow = create_model("resnet8", num_classes=3, in_channels=1, width=0.5, stem="cifar")
        for weight in (p for p in shadow.parameters() if p.dim() == 4):
            f, c = weight.shape[:2]
            numbers = 1000.0 * torch.arange(f).view(-1, 1) + torch.arange(c)
            weight.data.copy_(numbers.view(f, c, 1, 1).expand_as(weight))
        for plan in self.pruner.plans:
            apply_surgery_(plan, shadow)
        self.numbered[epoch] = {n: w for n, w in shadow.state_dict().items() if w.dim() == 4}


def literal(weight: Tensor, numbers: Tensor) -> tuple[dict[int, float], dict[int, float]]:
    """Number -> largest weight of outputs and of inputs, weight by weight."""
    outputs: dict[int, float] = {}
    inputs: dict[int, float] = {}
    for f in range(weight.shape[0]):
        for c in range(weight.shape[1]):
            first, second = divmod(int(numbers[f, c, 0, 0]), 1000)
            for value in weight[f, c].flatten().tolist():
                outputs[first] = max(outputs.get(first, 0.0), abs(value))
                inputs[second] = max(inputs.get(second, 0.0), abs(value))
    return outputs, inputs


def first_name(name: str) -> str:
    return name.removesuffix(".weight").replace(".layer", "")


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["union", "gating"])
def test_every_number_is_that_of_the_channel_it_names(tmp_path: Path, scheme: str) -> None:
    it = Watched(tmp_path / "run", {**SETTINGS, "scheme": scheme})
    assert any(plan.gates for plan in it.pruner.plans) == (scheme == "gating")
    assert [line["epoch"] for line in it.lines] == list(range(1, EPOCHS + 1))
    # Reconfigured at the ends of epochs 2 and 4: the lines after those name their channels anew.
    assert [line["epoch"] for line in it.lines if "channels" in line] == [1, 3, 5]
    channels: dict[str, dict[str, list[int]]] = {}
    zeros = small = 0
    for line in it.lines:
        channels = line.get("channels", channels)
        weights, numbered = it.weights[line["epoch"]], it.numbered[line["epoch"]]
        assert {first_name(name) for name in weights} == line["outputs"].keys()
        for name, weight in weights.items():
            own = literal(weight, numbered[name])
            for side, expected in zip(("outputs", "inputs"), own, strict=True):
                layer = first_name(name)
                if (layer, side) == ("conv1", "inputs"):
                    assert layer not in line[side]  # of the image
                    continue
                found = dict(zip(channels[side][layer], line[side][layer], strict=True))
                assert found == pytest.approx(expected, rel=5.01e-3)
                zeros += sum(value == 0 for value in found.values())
                small += sum(0 < value < 0.1 for value in found.values())
    assert zeros > 0
    assert small > 0
    first = it.lines[0]["channels"]["outputs"]
    left = {name: channels["outputs"].get(name, []) for name in first}
    assert all(numbers == list(range(len(numbers))) for numbers in first.values())
    assert sum(map(len, left.values())) < sum(map(len, first.values())) - 10
    # Some went from the middle, so that places and numbers differ.
    assert any(numbers != list(range(len(numbers))) for numbers in left.values())
    assert len(str(it.lines[0]["outputs"]["conv1"][0])) <= 7  # 0.0123


@pytest.mark.long
@pytest.mark.parametrize("batch", [3, 9, 12, 18])
def test_a_resumed_run_has_the_same_file(tmp_path: Path, whole: Path, batch: int) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", SETTINGS, At(batch, kill))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    expected = RunFolder(whole).channels.read_bytes()
    assert RunFolder(tmp_path / "run").channels.read_bytes() == expected != b""


@pytest.mark.long
def test_lines_after_the_checkpoint_are_taken_back(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Killed):
        run(path, {**SETTINGS, "checkpoint_every": 2}, At(3 * BATCHES + 2, kill))
    assert len(RunFolder(path).read_channels()) == 3  # the checkpoint is of epoch 2
    resume(path)
    assert RunFolder(path).channels.read_bytes() == RunFolder(whole).channels.read_bytes()


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({"reconfigure": "once", "once_at": 3, "interval": None}, [1, 2, 3, 4, 5]),
        ({"reconfigure": "end", "interval": None, "fine_tune": 1}, [1, 2, 3, 4, 5]),
        ({"method": "prunetrain-clicktrain", "switch_at": 2, "operators": "reference"}, [1, 2]),
        ({"method": "dense", "interval": None, "coefficient": None}, None),
    ],
    ids=["once", "ssl", "then-patterns", "dense"],
)
def test_which_runs_have_it(tmp_path: Path, settings: dict[str, Any], epochs: list[int] | None) -> None:
    own = {key: value for key, value in {**SETTINGS, **settings}.items() if value is not None}
    run(tmp_path / "run", own)
    folder = RunFolder(tmp_path / "run")
    assert folder.channels.exists() == (epochs is not None)
    lines = folder.read_channels()
    assert [line["epoch"] for line in lines] == (epochs or [])
    named = [line["epoch"] for line in lines if "channels" in line]
    assert named == {"once": [1, 4], "end": [1]}.get(own.get("reconfigure", ""), [1] if epochs else [])


def test_numbers_follow_plan_after_plan() -> None:
    model = nn.Sequential(nn.Conv2d(4, 5, 3), nn.Conv2d(5, 3, 1), nn.Linear(3, 2))
    channels = original_channels(model)
    assert channels.keys() == {"0", "1"}
    assert channels["0"].numbers == ((0, 1, 2, 3, 4), (0, 1, 2, 3))
    first = SurgeryPlan((Cut("0.weight", 0, (0, 2, 4), 5), Cut("1.weight", 1, (0, 2, 4), 5)))
    second = SurgeryPlan(
        (Cut("0.weight", 0, (1, 2), 3), Cut("1.weight", 1, (1, 2), 3), Cut("1.weight", 0, (2,), 3))
    )
    channels = renumbered(renumbered(channels, first), second)
    assert channels["0"].numbers == ((2, 4), (0, 1, 2, 3))
    assert channels["1"].numbers == ((2,), (2, 4))


def test_indices_of_one_channel_are_told_by_their_first() -> None:
    axis = ChannelAxis(0, torch.tensor([2, -1, 0, 2, 1, 0]), 3)
    weight = torch.tensor([-3.0, 9.0, 0.5, 1.0, 0.0, -0.5]).view(6, 1, 1, 1)
    assert axis.first_indices().tolist() == [2, 4, 0]
    assert axis.largest(weight).tolist() == [0.5, 0.0, 3.0]
