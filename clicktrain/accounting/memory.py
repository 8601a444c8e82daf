"""Memory of a training iteration: estimated from what the network keeps, and measured (PruneTrain 4.3)."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clicktrain.accounting.watching import no_trace, plain
from clicktrain.errors import UserError
from clicktrain.graph.inputs import Inputs, as_inputs, blank, first_tensor
from clicktrain.graph.trace import force_eager

_BATCHES = (2, 4)
"""Two batch sizes separate the part per image from the fixed one; batch norm needs more than one image."""

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes per image that a layer is the first to keep for the backward pass."""

    name: str
    activations_per_image: int


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """What an iteration needs, in bytes; made by `training_memory`.

    The parts are added up as if all were needed at the same moment, which is a little more than the truth:
    when the last gradients of weights come, most activations have gone. ``calibration`` corrects it.

    Attributes:
        activations_per_image, activations_fixed: kept from the forward pass for the backward pass, inputs of
            the network included. The fixed part does not grow with the batch (statistics of batch norms).
        workspace_per_image: for the gradients of activations on their way back: twice the largest activation.
        gradients: of the trained parameters. It is also what data-parallel training exchanges in an
            iteration (section 5, figure 11).
        calibration: measured / estimated, 1.0 while nothing has been measured.
    """

    activations_per_image: int
    activations_fixed: int
    workspace_per_image: int
    weights: int
    gradients: int
    optimizer: int
    layers: tuple[LayerMemory, ...] = ()
    calibration: float = 1.0

    @property
    def per_image(self) -> int:
        """What one more image in the batch needs, before calibration."""
        return self.activations_per_image + self.workspace_per_image

    @property
    def fixed(self) -> int:
        """What does not depend on the batch, before calibration."""
        return self.activations_fixed + self.weights + self.gradients + self.optimizer

    def at_batch(self, images: int) -> int:
        """Bytes of an iteration with that many images per batch, calibrated."""
        return round(self.calibration * (self.fixed + images * self.per_image))

    def with_calibration(self, calibration: float) -> TrainingMemory:
        """The same estimate with another calibration."""
        return dataclasses.replace(self, calibration=calibration)

    def calibrated(self, measured: int, images: int) -> TrainingMemory:
        """The same with the calibration that makes ``at_batch(images)`` the measured number of bytes."""
        return self.with_calibration(measured / max(self.fixed + images * self.per_image, 1))


def training_memory(
    model: nn.Module,
    example: Any,
    optimizer: Optimizer | None = None,
    *,
    averages: Sequence[nn.Module] = (),
    autocast: Autocast = contextlib.nullcontext,
) -> TrainingMemory:
    """Estimate the memory of a training iteration from the graph that a forward pass leaves behind.

    Two small batches of zeros go through the network in training mode; every storage that autograd keeps is
    counted once, so the estimate fits whatever the network is made of. Mode, buffers, gradients and random
    state are afterwards as before. What an operation keeps outside of autograd's saved tensors is not seen.

    Args:
        model: the network; a compiled one is taken as it was before.
        example: a batch of inputs; only shapes without the batch, dtypes and devices count.
        optimizer: its state counts as it is; before the first step as SGD, Adam and AdamW will make it.
        averages: further copies of the weights that are held (moving averages).

    Raises:
        UserError: the network does not take a batch of two such inputs.
    """
    model = plain(model)
    inputs = as_inputs(example, model)
    small, large = (_kept(model, blank(inputs, batch), autocast) for batch in _BATCHES)
    step = _BATCHES[1] - _BATCHES[0]
    layers = tuple(LayerMemory(name, (large[name] - small[name]) // step) for name in large)
    per_image = (large.total() - small.total()) // step
    largest = max((large.largest - small.largest) // step, 0)
    return TrainingMemory(
        activations_per_image=per_image,
        activations_fixed=max(small.total() - _BATCHES[0] * per_image, 0),
        workspace_per_image=2 * largest,
        weights=_unique_bytes(t for m in (model, *averages) for t in (*m.parameters(), *m.buffers())),
        gradients=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        optimizer=0 if optimizer is None else optimizer_bytes(optimizer),
        layers=tuple(layer for layer in layers if layer.activations_per_image > 0),
    )


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state.

    What SGD, Adam, AdamW and optimizers with an attribute ``copies_of_weights`` keep per weight is known
    before their first step too (and counted, without a few numbers per parameter); of others it is what they
    hold now.
    """
    known: int | None = getattr(optimizer, "copies_of_weights", None)
    if known is None and not isinstance(optimizer, (SGD, Adam, AdamW)):
        return _unique_bytes(t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, Tensor))
    total = 0
    for group in optimizer.param_groups:
        copies = known or (3 if group.get("amsgrad") else 2)
        if isinstance(optimizer, SGD):
            copies = 1 if group.get("momentum") else 0
        total += copies * sum(p.nbytes for p in group["params"] if p.requires_grad)
    return total


def measure_training_memory(
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor],
    optimizer: Optimizer | None = None,
    *,
    averages: Sequence[nn.Module] = (),
    autocast: Autocast = contextlib.nullcontext,
) -> int:
    """Bytes that an iteration really needs at its highest point, weights and optimizer state included.

    One forward and backward pass, whose gradients are thrown away; the model and the optimizer are left as
    they were. On cuda PyTorch's allocator is asked for its peak; elsewhere the tensors that are alive are
    followed, operation by operation, which leaves out what an operation allocates and frees inside itself.

    Args:
        batch: inputs of the size that is to be measured, on the model's device.
        loss: of the network's output, 0-dim.
        optimizer: its state counts as `optimizer_bytes`.
    """
    model = plain(model)
    inputs = as_inputs(batch, model)
    first = first_tensor(inputs)
    trained = [p for p in model.parameters() if p.requires_grad]
    resident = _unique_bytes(t for m in (model, *averages) for t in (*m.parameters(), *m.buffers()))
    resident += 0 if optimizer is None else optimizer_bytes(optimizer)

    def iteration() -> None:
        with autocast():
            output = loss(inputs.call(model))
        # Not backward(): the parameters' own gradients and the hooks on them are left alone.
        torch.autograd.grad(output, trained, allow_unused=True)

    with no_trace(model, inputs, training=True), force_eager(), torch.enable_grad():
        if first.is_cuda:
            peak = _cuda_peak(iteration, first.device)
        else:
            with _LiveBytes() as live:
                iteration()
            peak = live.peak
    return resident + peak + sum(t.nbytes for t in inputs.tensors())


def _cuda_peak(iteration: Callable[[], None], device: torch.device) -> int:
    """Above what was allocated before; a first pass lets libraries take what they take once."""
    iteration()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    iteration()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations make, and takes them off as they die."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, int] = {}
        self._now = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            key = _key(leaf) if isinstance(leaf, Tensor) else None
            if key is None or key in known or key in self._alive:  # a view, or written in place
                continue
            storage = leaf.untyped_storage()
            self._alive[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self._now)
        return result

    def _gone(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)


class _Kept(Counter[str]):
    """Bytes that autograd keeps after a forward pass, by layer; and the largest of the storages."""

    largest = 0


def _kept(model: nn.Module, batch: Inputs, autocast: Autocast) -> _Kept:
    own = {_key(t) for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}  # held, so that no storage takes the place of another
    kept, running = _Kept(), [""]

    def pack(tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key is not None and key not in own and key not in seen:
            seen[key] = tensor
            size = tensor.untyped_storage().nbytes()
            kept[running[-1]] += size
            kept.largest = max(kept.largest, size)
        return tensor

    with (
        no_trace(model, batch, training=True),
        force_eager(),
        torch.inference_mode(False),
        torch.enable_grad(),
        _names(model, running),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast(),
    ):
        try:
            batch.call(model)
        except (RuntimeError, ValueError, TypeError) as error:
            first = str(error).split("\n", 1)[0]
            raise UserError(
                f"the memory of training cannot be estimated: the network does not take a batch of shape "
                f"{tuple(first_tensor(batch).shape)}: {first}"
            ) from error
    return kept


@contextlib.contextmanager
def _names(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the name of the module that runs at the end of a list."""

    def enter(name: str, *_: Any) -> None:
        running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(enter, name), prepend=True))
            hooks.enter_context(module.register_forward_hook(leave))
        yield


def _key(tensor: Tensor) -> int | None:
    """Identity of what holds a tensor's numbers; None for sparse and other tensors without a storage."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    return int(tensor.untyped_storage()._cdata)


def _unique_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_key(t): t.nbytes for t in tensors}.values())


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def bytes_of(words: str) -> int:
    """``4GiB``, ``500 MB`` or ``123456`` as bytes.

    Raises:
        UserError: it is not written like that, or not above 0.
    """
    amount = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", words)
    unit = (amount[2] or "B").upper() if amount else ""
    if amount is None or unit not in _UNITS or float(amount[1]) <= 0:
        raise UserError(f"{words!r} is no amount of memory: write it as 4GiB, 500MB or a number of bytes")
    return round(float(amount[1]) * _UNITS[unit])


def bytes_in_words(count: int) -> str:
    """``1.4 GiB``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if count >= (size := _UNITS[unit.upper()]):
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
