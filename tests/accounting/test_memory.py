"""Memory of an iteration by hand, against what is alive, and without a trace left."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.accounting import TrainingMemory, count, measure_training_memory, training_memory
from clicktrain.accounting.memory import optimizer_bytes
from clicktrain.errors import UserError
from clicktrain.models import create_model


class Small(nn.Module):
    """Convolution, batch norm, in-place ReLU, pooling, dropout: 8 x 8 images of 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(4 * 16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.conv(x)), inplace=True))
        return self.fc(F.dropout(x.flatten(1), 0.5, self.training))


def test_every_part_by_hand() -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    memory = training_memory(model, torch.zeros(1, 3, 8, 8), optimizer)
    feature, pooled = 4 * 64 * 4, 4 * 16 * 4
    # Kept: the image; the convolution's output (by batch norm); ReLU's output, which pooling keeps too;
    # pooling's indices (64 bit); what dropout multiplies with, and its result (by the linear layer).
    kept = {
        "conv": 3 * 64 * 4,
        "bn": feature,
        "": feature + memory_of_dropout(pooled),
        "pool": 2 * pooled,
        "fc": pooled,
    }
    assert {layer.name: layer.activations_per_image for layer in memory.layers} == kept
    assert memory.activations_per_image == sum(kept.values())
    assert memory.activations_fixed == 2 * 4 * 4  # mean and inverse deviation of the batch norm
    assert memory.workspace_per_image == 2 * feature
    parameters = 4 * 27 + 4 + 8 + 5 * 64
    assert memory.gradients == memory.optimizer == 4 * parameters
    assert memory.weights == 4 * parameters + 8 * 4 + 8
    fixed = memory.weights + memory.gradients + memory.optimizer + memory.activations_fixed
    assert memory.at_batch(10) == fixed + 10 * (memory.activations_per_image + 2 * feature)


def memory_of_dropout(pooled: int) -> int:
    """The mask: bool where dropout is one operation, else as the numbers."""
    x = torch.ones(4, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.dropout(x, 0.5)
    return pooled * kept[0].element_size() // 4


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "mobilenet_v1"])
def test_the_estimate_is_near_what_is_alive_and_calibration_makes_it_so(name: str) -> None:
    model = create_model(name, num_classes=10, width=0.25, stem="cifar")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    memory = training_memory(model, torch.zeros(1, 3, 32, 32), optimizer)
    found = {}
    for batch in (8, 32):
        x, y = torch.zeros(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.int64)
        found[batch] = measure_training_memory(model, x, lambda z, y=y: F.cross_entropy(z, y), optimizer)  # type: ignore[misc]
        assert 0.6 * memory.at_batch(batch) < found[batch] < 1.1 * memory.at_batch(batch)
    calibrated = memory.calibrated(found[8], 8)
    assert abs(calibrated.at_batch(8) - found[8]) <= 1
    assert calibrated.at_batch(32) == pytest.approx(found[32], rel=0.15)


def test_what_is_measured_is_what_a_backward_pass_holds() -> None:
    """One linear layer without a bias: input, output, its gradient, that of the weight."""
    model = nn.Linear(1000, 200, bias=False)
    x = torch.zeros(50, 1000)
    found = measure_training_memory(model, x, lambda z: z.sum())
    weight, output = 4 * 1000 * 200, 4 * 50 * 200
    # Weight, its gradient, the batch, the output or its gradient (of sum: one number, expanded).
    assert 2 * weight + 4 * 50 * 1000 <= found <= 2 * weight + 4 * 50 * 1000 + 2 * output


def test_fewer_channels_need_less_and_averages_more() -> None:
    wide, narrow = (create_model("resnet20", num_classes=10, width=w) for w in (1.0, 0.5))
    example = torch.zeros(1, 3, 32, 32)
    one, half = training_memory(wide, example), training_memory(narrow, example)
    assert half.activations_per_image - 3 * 32 * 32 * 4 < 0.55 * one.activations_per_image
    assert half.gradients < 0.3 * one.gradients
    with_average = training_memory(wide, example, averages=[copy.deepcopy(wide)])
    assert with_average.weights == 2 * one.weights


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p, lr=0.1), 2),
        (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), 3),
    ],
)
def test_optimizer_state_before_and_after_the_first_step(make: object, copies: int) -> None:
    model = nn.Linear(100, 100, bias=False)
    optimizer = make(model.parameters())  # type: ignore[operator]
    assert optimizer_bytes(optimizer) == copies * 40_000
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    assert optimizer_bytes(optimizer) == copies * 40_000


def test_watching_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = Small()
    model.bn.eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    calls = []
    model.fc.weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    training_memory(model, torch.zeros(1, 3, 8, 8), optimizer)
    measure_training_memory(model, torch.ones(4, 3, 8, 8), lambda z: z.square().sum(), optimizer)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training
    assert not model.bn.training
    assert not optimizer.state
    assert not calls
    assert all(p.grad is None for p in model.parameters())


class Counts(nn.Module):
    """Counts its calls, and puts another tensor in the place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 2), 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = self.seen + 1
        z: Tensor = self.fc(x)
        return z


def test_watching_does_not_count() -> None:
    model = Counts()
    seen = model.seen
    training_memory(model, torch.zeros(1, 4))
    measure_training_memory(model, torch.zeros(3, 4), lambda z: z.sum())
    count(model, torch.zeros(1, 4))
    assert model.calls == 0
    assert model.seen is seen
    assert float(seen) == 0


def test_autocast_keeps_less() -> None:
    model, example = (
        create_model("vgg11", num_classes=10, width=0.25, stem="cifar"),
        torch.zeros(1, 3, 32, 32),
    )

    def bf16() -> contextlib.AbstractContextManager[None]:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    plain = training_memory(model, example)
    assert training_memory(model, example, autocast=bf16).activations_per_image < plain.activations_per_image


def test_a_network_that_takes_no_two_images() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(1, 12) @ torch.ones(12, 2)

    with pytest.raises(UserError, match="cannot be estimated"):
        training_memory(One(), torch.zeros(1, 3, 2, 2))


def test_at_batch_is_linear() -> None:
    memory = TrainingMemory(100, 7, 20, 30, 40, 50)
    assert [memory.at_batch(n) for n in (0, 1, 2)] == [127, 247, 367]
    assert memory.calibrated(494, 1).at_batch(2) == 734


def test_an_optimizer_of_another_kind_counts_by_what_it_holds() -> None:
    model = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)  # makes its state at once
    assert 40_000 <= optimizer_bytes(optimizer) < 40_100
