"""Several processes, one network: the same channels and weights everywhere, and those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from start_processes import run_together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clicktrain import PruneTrain
from clicktrain.errors import UserError

SCRIPT = Path(__file__).parent / "data_parallel_loop.py"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed"),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_together(SCRIPT, 1, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_together(SCRIPT, 2, tmp_path_factory.mktemp("two"))


def end_of(folder: Path, name: str, rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a process ended with."""
    told = json.loads((folder / f"{name}-{rank}.json").read_text())
    return told, load_file(folder / f"{name}-{rank}.safetensors")


def test_the_first_process_has_the_word(one: Path, two: Path) -> None:
    heard = [json.loads((two / f"agreement-{rank}.json").read_text()) for rank in range(2)]
    first = {"numbers": [0.1, 2.0], "text": "pröcess 0", "mask": [True, True], "weights": [[0.0, 0.0]] * 3}
    assert heard == [{**first, "mean": 0.5}] * 2
    assert json.loads((one / "agreement-0.json").read_text()) == {**first, "mean": 0.0}


@pytest.mark.parametrize(("loop", "first_step"), [("not wrapped", 0), ("wrapped once", 1)])
def test_gradients_that_no_wrapper_averages_are_refused(loop: str, first_step: int, two: Path) -> None:
    """Without a wrapper at the first step; with one of the dense weights, at the first on packed ones."""
    refused = [json.loads((two / f"refused-{rank}.json").read_text())[loop] for rank in range(2)]
    assert refused[0] == refused[1]
    step, sentence = refused[0]
    assert sentence.startswith("process 1 has other gradients than the first one: wrap the network by")
    assert (step > first_step) if first_step else step == 0


@pytest.mark.parametrize("name", ["channels", "packed", "rigl", "dsr", "moving", "moving-dsr"])
def test_two_processes_train_as_one_does(name: str, one: Path, two: Path) -> None:
    alone, weights = end_of(one, name, 0)
    (first, mine), (second, others) = (end_of(two, name, rank) for rank in range(2))
    assert first["plans"] == second["plans"]
    assert all(torch.equal(mine[key], others[key]) for key in mine)
    assert first["plans"] == alone["plans"]
    for key, value in weights.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-5)
    # A wrapper for the network as it was at first, and one whenever it had other parameters.
    assert first["wraps"] == alone["wraps"]
    if name == "channels":
        assert first["plans"]
        assert first["wraps"] == sorted(set(first["wraps"]), reverse=True)
        assert len(first["wraps"]) in (len(first["plans"]), len(first["plans"]) + 1)  # the last is at the end
    elif name == "packed":
        assert len(first["wraps"]) == 2
        assert first["wraps"][1] < first["wraps"][0]
    elif name == "moving":
        assert len(first["wraps"]) == 1  # packed from the start, and the number of values stays
    elif name == "moving-dsr":
        assert len(first["wraps"]) > 3  # weights have moved from layer to layer


def test_statistics_and_measurements_that_differ_decide_alike(two: Path) -> None:
    (first, mine), (second, others) = (end_of(two, "normed", rank) for rank in range(2))
    assert first["plans"]
    assert first["plans"] == second["plans"]
    chosen = [
        [e["round_to"] for e in told["events"] if e["event"] == "reconfigured"] for told in (first, second)
    ]
    assert chosen[0] == chosen[1]
    statistics = ("running_mean", "running_var")
    assert all(torch.equal(mine[key], others[key]) for key in mine if not key.endswith(statistics))
    assert any(not torch.equal(mine[key], others[key]) for key in mine if key.endswith(statistics))


def test_a_wrapper_is_made_anew_only_when_parameters_are_replaced() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = PruneTrain(coefficient=5.0, interval=1).attach(model, optimizer, epochs=2, steps_per_epoch=2)
    made: list[nn.Module] = []

    def wrap(module: nn.Module) -> Any:
        made.append(module)
        return torch.compile(module, backend="eager")

    forward = pruner.wrapped(wrap)
    sizes = []
    for number in range(4):
        y = forward(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(number)))
        sizes.append((len(made), pruner.revision))
        loss = y.square().mean()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert sizes == [(1, 0), (1, 0), (2, 1), (2, 1)]
    assert made == [model, model]
    assert forward.current is forward.current


def test_every_network_of_a_long_run_is_compiled() -> None:
    """PyTorch keeps 8 compiled versions of a function, and then runs it as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 2, 3), nn.Flatten())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # what is zero stays zero
    pruner = PruneTrain(coefficient=1e-9, interval=1).attach(model, optimizer, epochs=12, steps_per_epoch=1)
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(sum(parameter.numel() for parameter in model.parameters()))
        return graph.forward

    forward = pruner.wrapped(lambda module: torch.compile(module, backend=backend))
    for number in range(12):
        loss = (
            forward(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(number))).square().mean()
        )
        loss.backward()
        pruner.observe(loss)
        with torch.no_grad():  # one more channel has become zero
            model.get_parameter("0.weight")[0] = 0
            model.get_parameter("0.bias")[0] = 0
            model.get_parameter("2.weight")[:, 0] = 0
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.revision > 9
    assert len(set(compiled)) == len(pruner.plans) + 1


def test_a_network_in_a_wrapper_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapper = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 8, 3)))
        with pytest.raises(UserError, match=r"the network itself, not a DistributedDataParallel.*wrapped"):
            PruneTrain().attach(
                wrapper, torch.optim.SGD(wrapper.parameters(), lr=0.1), epochs=1, steps_per_epoch=1
            )
    finally:
        dist.destroy_process_group()
