"""Only gradients of kept weights travel, and every byte that travels is counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_wrapper,
    fp16_compress_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from clicktrain import ClickTrain, Dense, Pruner
from clicktrain.comm import Exchange, ExchangedMasks, KeptExchange, counted, masked_allreduce_hook
from clicktrain.comm.agreement import sum_over_processes
from clicktrain.comm.collectives import carried_by
from clicktrain.errors import UserError
from clicktrain.methods import RigL

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone: what it sends comes back."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


class Masks:
    """Stands for a pruner."""

    def __init__(self, masks: dict[Tensor, Tensor], all_used: bool = False) -> None:
        self.now = ExchangedMasks(masks, all_used)

    def exchanged_masks(self) -> ExchangedMasks:
        return self.now


def mask_of(weight: Tensor, density: float, seed: int = 1) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < density


def backward(model: Any) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    F.cross_entropy(model(x), torch.arange(4)).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def exchanged(
    model: nn.Module, state: KeptExchange, hook: Callable[..., Any] = masked_allreduce_hook, times: int = 1
) -> Exchange:
    """Backward passes through a wrapper with the hook; what was counted in the last of them."""
    wrapper = DistributedDataParallel(model)
    wrapper.register_comm_hook(state, hook)
    sent: Exchange = {}
    for _ in range(times):
        model.zero_grad()
        sent = {}
        with counted(sent):
            backward(wrapper)
    return sent


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("times", [1, 3])  # buckets are made again after the first backward pass
def test_gradients_of_kept_weights_travel_and_others_become_zero(channels_last: bool, times: int) -> None:
    model = network()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = copy.deepcopy(model)
    backward(plain)
    masks = {model[at].weight: mask_of(model[at].weight, 0.3) for at in (0, 3)}  # type: ignore[index]
    sent = exchanged(model, KeptExchange(Masks(masks)), times=times)
    if times == 1:  # before running statistics have any influence
        for parameter, expected in zip(model.parameters(), gradients(plain), strict=True):
            assert parameter.grad is not None
            mask = masks.get(parameter)
            wanted = expected if mask is None else expected.masked_fill(~mask, 0.0)
            torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=0)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert sent == {"gradients": [4 * (sum(p.numel() for p in model.parameters()) - pruned), 1]}


def test_without_masks_everything_travels() -> None:
    model = network()
    plain = copy.deepcopy(model)
    backward(plain)
    sent = exchanged(model, KeptExchange(Masks({})))
    assert all(map(torch.equal, gradients(model), gradients(plain)))
    assert sent == {"gradients": [4 * sum(p.numel() for p in model.parameters()), 1]}


def test_masks_that_move_are_followed() -> None:
    model = network()
    weight = model[3].weight  # type: ignore[index]
    source = Masks({weight: mask_of(weight, 0.5, 1)})
    wrapper = DistributedDataParallel(model)
    wrapper.register_comm_hook(KeptExchange(source), masked_allreduce_hook)
    for seed in (1, 2):
        source.now = ExchangedMasks({weight: mask_of(weight, 0.5, seed)})
        model.zero_grad()
        backward(wrapper)
        assert weight.grad is not None
        assert torch.equal(weight.grad != 0, source.now.masks[weight])


def test_a_step_that_uses_all_gradients_sends_them_and_says_so() -> None:
    model = network()
    plain = copy.deepcopy(model)
    backward(plain)
    mask = mask_of(model[3].weight, 0.3)  # type: ignore[index]
    sent = exchanged(model, KeptExchange(Masks({model[3].weight: mask}, all_used=True)))  # type: ignore[index]
    assert all(map(torch.equal, gradients(model), gradients(plain)))
    every, outside = 4 * sum(p.numel() for p in model.parameters()), 4 * int((~mask).sum())
    assert sent == {"gradients": [every - outside, 1], "growth": [outside, 0]}


def test_dense_asks_for_no_masks() -> None:
    model = network()
    source = Masks({model[3].weight: mask_of(model[3].weight, 0.3)})  # type: ignore[index]
    sent = exchanged(model, KeptExchange(source, dense=True))
    assert sent == {"gradients": [4 * sum(p.numel() for p in model.parameters()), 1]}


def named(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook under another name: PyTorch refuses that of its bfloat16 wrapper where there is no GPU."""
    return lambda state, bucket: hook(state, bucket)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_compressing_wrappers_compose(dtype: torch.dtype, own: bool) -> None:
    model = network()
    plain = copy.deepcopy(model)
    backward(plain)
    masks = {model[at].weight: mask_of(model[at].weight, 0.3) for at in (0, 3)}  # type: ignore[index]
    wrap = fp16_compress_wrapper if dtype is torch.float16 else bf16_compress_wrapper
    hook = masked_allreduce_hook if own else named(wrap(masked_allreduce_hook))
    sent = exchanged(model, KeptExchange(Masks(masks), dtype=dtype if own else None), hook)
    for parameter, expected in zip(model.parameters(), gradients(plain), strict=True):
        mask = masks.get(parameter)
        rounded = expected.to(dtype).float()
        wanted = rounded if mask is None else rounded.masked_fill(~mask, 0.0)
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, wanted)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert sent == {"gradients": [2 * (sum(p.numel() for p in model.parameters()) - pruned), 1]}


def test_counts_add_up_by_purpose_and_nest() -> None:
    outer: Exchange = {}
    inner: Exchange = {}
    with counted(outer):
        with counted(inner):
            exchanged(network(), KeptExchange(Masks({})))
        exchanged(network(), KeptExchange(Masks({})))
    assert outer["gradients"] == [2 * inner["gradients"][0], 2]
    sum_over_processes(torch.zeros(3))  # there is no other process: nothing is sent
    assert set(outer) == {"gradients"}


def test_an_all_reduce_that_fails_is_no_gradient() -> None:
    class Failed:
        def get_future(self) -> torch.futures.Future[list[Tensor]]:
            future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
            future.set_exception(RuntimeError("connection closed by peer"))  # type: ignore[arg-type]
            return future

    model = network()
    masks = {model[3].weight: mask_of(model[3].weight, 0.3)}  # type: ignore[index]
    with (
        carried_by(lambda *_: Failed()),
        pytest.raises(RuntimeError, match="connection closed by peer"),
    ):
        exchanged(model, KeptExchange(Masks(masks)))


def attached(method: Any, **options: Any) -> Pruner:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner: Pruner = method.attach(model, optimizer, epochs=4, steps_per_epoch=4, **options)
    return pruner


def hooked(pruner: Pruner) -> Any:
    def wrap(model: nn.Module) -> DistributedDataParallel:
        wrapper = DistributedDataParallel(model)
        wrapper.register_comm_hook(KeptExchange(pruner), masked_allreduce_hook)
        return wrapper

    return pruner.wrapped(wrap)


def train(pruner: Pruner, forward: Any, steps: int = 16, accumulate: int = 1) -> list[Exchange]:
    """What travelled in each backward pass."""
    every = []
    for step in range(steps):
        sent: Exchange = {}
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        with counted(sent):
            loss = F.cross_entropy(forward(x), torch.arange(4))
            loss.backward()
        every.append(sent)
        pruner.observe(loss)
        if (step + 1) % accumulate == 0:
            pruner.optimizer.step()
            pruner.optimizer.zero_grad()
    return every


def test_packed_weights_send_their_values_and_no_index() -> None:
    pruner = attached(ClickTrain(compression=3), packed=True)
    forward = hooked(pruner)
    every = train(pruner, forward)
    assert pruner.frozen
    last = sum(parameter.numel() for parameter in pruner.model.parameters())
    assert every[-1] == {"gradients": [4 * last, 1]}
    assert every[0]["gradients"][0] > 4 * last
    buffers = list(forward.current.named_module_buffers)
    assert not [name for name in buffers if name.endswith("keep_bits")]
    assert any(name.endswith("running_mean") for name in buffers)


@pytest.mark.parametrize(("accumulate", "interval"), [(1, 4), (3, 4), (3, 2)])
def test_growth_reads_gradients_that_were_exchanged(accumulate: int, interval: int) -> None:
    """Also where a step turns out longer than any before it: then units move at the next one."""
    ends = []
    for kept in (True, False):
        pruner = attached(RigL(sparsity=0.5, interval=interval, granularity="weight"))
        forward = hooked(pruner) if kept else pruner.wrapped(lambda model: model)
        every = train(pruner, forward, accumulate=accumulate)
        ends.append([event for event in pruner.events if event["event"] == "regrown"])
        if kept and accumulate == 1:
            grown = [step for step, sent in enumerate(every, 1) if "growth" in sent]
            assert grown == [event["step"] for event in ends[0]]
    assert ends[0]
    if interval == 4:
        assert ends[0] == ends[1]
    else:
        assert (ends[0][0]["step"], ends[1][0]["step"]) == (6, 3)


def test_own_clipping_can_look_at_the_gradients_that_count() -> None:
    pruner = attached(RigL(sparsity=0.5, interval=4))
    masks = pruner.exchanged_masks().masks
    assert masks
    backward(pruner.model)
    pruner.mask_gradients()
    for weight, mask in masks.items():
        assert weight.grad is not None
        assert not weight.grad[~mask].any()
        assert weight.grad[mask].any()


def test_hooks_that_masks_forbid_are_refused() -> None:
    def wrap(model: nn.Module) -> DistributedDataParallel:
        wrapper = DistributedDataParallel(model)
        wrapper.register_comm_hook(PowerSGDState(None), fp16_compress_wrapper(powerSGD_hook))
        return wrapper

    with pytest.raises(UserError, match=r"PowerSGD .* masked_allreduce_hook"):
        _ = attached(RigL(sparsity=0.5, interval=4)).wrapped(wrap).current
    assert attached(Dense()).wrapped(wrap).current is not None
    with pytest.raises(UserError, match=r"takes the pruner that attach returned, not a Sequential"):
        KeptExchange(network())  # type: ignore[arg-type]
