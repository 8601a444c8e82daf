"""Models that are called with keyword arguments, dicts, several tensors or optional arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_kinds import CLASSES, INPUTS, inputs, network
from torch import Tensor, nn

from clicktrain import PaT, PruneTrain, UserError, count
from clicktrain.accounting.memory import measure_training_memory, training_memory
from clicktrain.graph import Inputs, as_inputs
from clicktrain.graph.inputs import batch_size, blank, first_of_batch, first_tensor, owned, resized
from clicktrain.methods import Method, Pruner

STRONG = PruneTrain(coefficient=3.0, interval=1, check_outputs=True)
EARLY = PaT(policy="epoch", prune_epoch=0, prune_ratio=0.4, prune_ratio_of="neurons")
FORMS = [f"inputs: {form}" for form in INPUTS]


def run(method: Method[Any], form: str, example: Any = None) -> tuple[nn.Module, Pruner]:
    torch.manual_seed(0)
    model = network(form).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = method.attach(model, optimizer, epochs=2, steps_per_epoch=3, example=example)
    for _ in range(6):
        call = as_inputs(inputs(form), model).map(Tensor.float)
        loss = nn.functional.cross_entropy(call.call(model)["logits"], torch.arange(4) % CLASSES)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    return model, pruner


@pytest.mark.parametrize("method", [STRONG, EARLY], ids=["prunetrain", "pat"])
@pytest.mark.parametrize("form", FORMS)
def test_channels_go_however_the_model_is_called(form: str, method: Method[Any]) -> None:
    model, pruner = run(method, form)
    assert model.stem[0].out_channels + model.inner[0][0].out_channels < 16  # type: ignore[union-attr, index]
    changes = [e["max_output_change"] for e in pruner.events if e["event"] == "reconfigured"]
    assert method is EARLY or all(change < 1e-4 for change in changes)


@pytest.mark.parametrize("form", FORMS)
def test_the_example_may_be_given(form: str) -> None:
    example = as_inputs(inputs(form, 1), network(form)).map(Tensor.float)
    model, _ = run(EARLY, form, example if form == "inputs: all" else _float(inputs(form, 1)))
    assert model.stem[0].out_channels + model.inner[0][0].out_channels < 16  # type: ignore[union-attr, index]


def _float(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, Tensor.float, value)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_of_a_batch_is_small_and_its_own(form: str) -> None:
    model = network(form)
    pruner = EARLY.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, steps_per_epoch=1)
    call = as_inputs(inputs(form, 64), model)
    call.call(model)
    kept = pruner.network.prunable.example
    assert batch_size(kept) <= 3
    for mine, theirs in zip(kept.tensors(), call.tensors(), strict=True):
        assert not mine.requires_grad
        assert mine.untyped_storage().nbytes() == mine.numel() * mine.element_size()
        assert mine.data_ptr() != theirs.data_ptr()
        assert torch.equal(mine, theirs[: len(mine)])


@pytest.mark.parametrize("form", FORMS)
def test_costs_are_counted(form: str) -> None:
    model = network(form)
    cost = count(model, inputs(form))
    assert cost.forward_flops == count(model, inputs(form, 2)).forward_flops  # per image
    assert {layer.name for layer in cost.layers} >= {"stem.0", "fc"}
    assert ("embed" in {layer.name for layer in cost.layers}) == (form in ("inputs: two", "inputs: all"))
    memory = training_memory(model, inputs(form))
    measured = measure_training_memory(model, inputs(form, 8), lambda y: y["logits"].mean())
    assert 0.3 < memory.at_batch(8) / measured < 3


def test_a_network_that_was_never_called_is_told() -> None:
    model, other = network("AuxiliaryHead"), network("AuxiliaryHead")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = EARLY.attach(model, optimizer, epochs=1, steps_per_epoch=2)
    loss = other(inputs("AuxiliaryHead"))[0].mean()
    loss.backward()
    pruner.observe(loss)
    with pytest.raises(UserError, match="no forward pass of the network that was attached has been seen"):
        optimizer.step()


def test_batches_of_other_sizes() -> None:
    call = Inputs(
        (torch.arange(6.0).view(3, 2), [torch.arange(3), 7]), {"table": torch.ones(5, 5), "no": None}
    )
    assert batch_size(call) == 3
    assert first_tensor(call).shape == (3, 2)
    five = resized(call, 5)
    assert five.args[0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert five.args[1][0].tolist() == [0, 1, 2, 0, 1]
    assert five.args[1][1] == 7
    assert five.kwargs["table"].shape == (5, 5)
    assert blank(call, 2).args[0].tolist() == [[0, 0], [0, 0]]
    assert blank(call, 2).args[1][0].tolist() == [0, 1]  # indices stay what they were
    assert first_of_batch(call, 1).args[0].tolist() == [[0, 1]]
    assert owned(first_of_batch(call, 1)).args[0].untyped_storage().nbytes() == 8
    with pytest.raises(UserError, match="holds no tensor"):
        first_tensor(Inputs((1, "x")))
