"""A training step recorded once as a CUDA graph, and replayed: kernels follow each other without Python.

Narrow and sparse networks have small kernels, and to launch one from Python takes longer than to run it.
Recorded are the forward pass, the loss and the backward pass. The optimizer's step is not: methods vote,
penalize and mask on its hooks.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clicktrain.compiler.lower import GLOBAL_HOOKS
from clicktrain.compiler.units import watched
from clicktrain.graph import is_plain
from clicktrain.graph.copying import HOOK_TABLES
from clicktrain.graph.random_state import own_random_numbers

R = TypeVar("R")
_VARIANTS = 4
"""Recordings that are kept, of batches of different shapes: each holds the activations of its own."""
_RESTLESS = 20
"""Steps in a row before each of which something has changed, after which that is said."""
_COLLECTING = "gradients of pruned weights are wanted in this step"
"""Every few hundred steps, of methods that grow weights by them: not worth a warning."""
_OWN = vars(nn.Module()).keys() - {"training"}
"""Tables of parameters, buffers, modules and hooks, which are looked at by themselves."""


class Recorder(Protocol):
    """What records calls of kernels and replays them."""

    def refusal(self, device: torch.device) -> str | None:
        """Why nothing on a device can be recorded, as a clause; None where it can."""

    def apart(self) -> Any:
        """What a replay would leave as it is although the calls change it: compared before and after them."""

    def warm_up(self, run: Callable[[], object], device: torch.device) -> None:
        """Run once as it will be recorded, so that all is there that is made at a first call."""

    def record(self, run: Callable[[], R], device: torch.device) -> tuple[R, Callable[[], None]]:
        """What ``run`` returns, in memory of its own, and what writes new results there."""


class CudaGraphs:
    """Records CUDA graphs that share one pool of memory: they are replayed one at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def refusal(self, device: torch.device) -> str | None:
        """They are for NVIDIA GPUs."""
        return (
            None if device.type == "cuda" else f"CUDA graphs are for NVIDIA GPUs, and this runs on {device}"
        )

    def apart(self) -> Any:
        """The state of generators on the CPU: a replay draws from the GPU's own alone."""
        return torch.get_rng_state().tolist(), random.getstate()

    def warm_up(self, run: Callable[[], object], device: torch.device) -> None:
        """On a stream of its own, as PyTorch wants it before a capture."""
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream(device).wait_stream(side)

    def record(self, run: Callable[[], R], device: torch.device) -> tuple[R, Callable[[], None]]:
        """Capture a graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self._pool):
            result = run()
        self._pool = graph.pool()
        return result, graph.replay


class RecordedStep:
    """``function(*tensors)`` and the backward pass of its loss, replayed from a CUDA graph where that can be.

    A call leaves the gradients as ``loss.backward()`` would: added to those that are there. The first call
    with a batch of some shape runs as written, the second is recorded, others are replayed on a copy of their
    batch. Whatever changes is noticed and recorded again: modes, parameters and buffers that were exchanged,
    positions of packed layers that have moved, numbers and texts among the attributes of modules. What else
    Python decides in ``function`` stays as it was when it was recorded. Gradients lie in memory that the next
    call writes to.

    A step that cannot be recorded runs as written, and a warning says once why: on another device, with hooks
    on modules or parameters, in several processes, where a value is read from the GPU (``item()``), where
    attributes or the CPU's random numbers change at every call. So does, without a warning, one in which a
    method wants the gradients of pruned weights too.

    Attributes:
        reason: why the last call ran as written, as a clause; None where it was replayed, or has to be seen
            once before it is recorded.
        replays: calls that were replayed.
    """

    def __init__(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        model: nn.Module,
        *,
        scale: Callable[[Tensor], Tensor] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            function: tensors of a batch -> the loss, 0-dim, or a tuple that begins with it.
            model: whose parameters are trained; what ``function`` calls.
            scale: of the loss before the backward pass, such as ``GradScaler.scale``.
            recorder: CUDA graphs by default.
        """
        self.function, self.model, self.scale = function, model, scale
        self.recorder: Recorder = recorder or CudaGraphs()
        self.reason: str | None = None
        self.replays = 0
        self._facts: _Facts | None = None
        self._recordings: dict[Any, _Recording | str] = {}
        """By kind of batch; a text says why it cannot be recorded."""
        self._seen: set[Any] = set()
        self._said: set[str] = set()
        self._changes = 0

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute gradients; returns what ``function`` does, always as a tuple, without gradients."""
        recording, self.reason = self._recording(tensors)
        if self.reason is not None and self.reason not in (*self._said, _COLLECTING):
            self._said.add(self.reason)
            warnings.warn(f"the step runs without a CUDA graph: {self.reason}", stacklevel=2)
        if recording is None:
            results = _as_tuple(self.function(*tensors))
            self._scaled(results[0]).backward()  # type: ignore[no-untyped-call]
            return tuple(one.detach() for one in results)
        self.replays += 1
        return recording.run(tensors)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scale is None else self.scale(loss)

    def _recording(self, tensors: tuple[Tensor, ...]) -> tuple[_Recording | None, str | None]:
        """The recording for a batch, or None and why, if that will not change by itself."""
        facts = self._facts
        if facts is None or (changed := facts.changed()) is not None:
            self._changes = 0 if facts is None else self._changes + 1
            self._facts, self._recordings, self._seen = _Facts(self.model), {}, set()
            facts = self._facts
        else:
            self._changes = 0
        if (reason := facts.refusal() or self._refusal(tensors)) is not None:
            return None, reason
        if self._changes >= _RESTLESS:
            return None, f"{changed} changes from step to step"
        kind = _kind_of(tensors)
        known = self._recordings.get(kind)
        if known is None and kind in self._seen:
            if len(self._recordings) >= _VARIANTS:
                return None, f"batches have more than {_VARIANTS} shapes"
            known = self._recordings[kind] = self._record(tensors, facts)
        self._seen.add(kind)
        return (None, known) if isinstance(known, str) else (known, None)

    def _refusal(self, tensors: tuple[Tensor, ...]) -> str | None:
        devices = {one.device for one in (*tensors, *self._facts.parameters)} if self._facts else set()
        if not tensors or not all(type(one) is Tensor for one in tensors):
            return "a batch is tensors and nothing else here"
        if len(devices) > 1:
            return f"tensors are on {' and '.join(sorted(map(str, devices)))}"
        if any(one.requires_grad for one in tensors):
            return "a tensor of the batch wants a gradient itself"
        if not torch.is_grad_enabled():
            return "gradients are disabled"
        return self.recorder.refusal(tensors[0].device)

    def _record(self, tensors: tuple[Tensor, ...], facts: _Facts) -> _Recording | str:
        """Record the step on a copy of a batch; why that is impossible, otherwise. Nothing else changes."""
        device = tensors[0].device
        static = tuple(one.clone() for one in tensors)

        def run() -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
            torch.clear_autocast_cache()  # what was cast before would not be cast again
            results = _as_tuple(self.function(*static))
            gradients = torch.autograd.grad(self._scaled(results[0]), facts.parameters, allow_unused=True)
            torch.clear_autocast_cache()
            own = _own_memory(gradients, facts.parameters, static)
            return tuple(one.detach() for one in results), own

        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            with own_random_numbers(tensors):
                before = self.recorder.apart()
                self.recorder.warm_up(run, device)
                drawn = self.recorder.apart() != before
            if (changed := facts.changed()) is not None:
                return f"{changed} changes at every call"
            if drawn:
                return "it draws random numbers on the CPU"
            with own_random_numbers(tensors):
                (results, gradients), replay = self.recorder.record(run, device)
        except RuntimeError as error:  # not allowed in a graph; what is wrong raises again
            return f"it cannot be recorded: {(str(error).strip().splitlines() or ['no message'])[0]}"
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        pairs = [(p, g) for p, g in zip(facts.parameters, gradients, strict=True) if g is not None]
        return _Recording(static, results, pairs, replay)


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    gradients: Sequence[tuple[nn.Parameter, Tensor]]
    replay: Callable[[], None]

    @torch.no_grad()
    def run(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for static, given in zip(self.inputs, tensors, strict=True):
            static.copy_(given, non_blocking=True)
        kept = [
            (parameter, mine, mine.clone() if parameter.grad is mine else parameter.grad)
            for parameter, mine in self.gradients
            if parameter.grad is not None
        ]
        self.replay()
        for parameter, mine, before in kept:
            if parameter.grad is mine:
                mine.add_(before)
            else:
                before.add_(mine)
        for parameter, mine in self.gradients:
            if parameter.grad is None:
                parameter.grad = mine
        return tuple(one.clone() for one in self.results)


class _Facts:
    """What a recording of a model's step holds for, compared in C before each call."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = list(model.named_modules())
        self._modules = [module for _, module in named]
        self._paths = [path or type(model).__name__ for path, _ in named]
        self.parameters = [one for one in model.parameters() if one.requires_grad]
        self._tables = [getattr(module, name) for module in self._modules for name in HOOK_TABLES]
        entries = [
            (path, module.__dict__, name, value)
            for path, module in zip(self._paths, self._modules, strict=True)
            for name, value in module.__dict__.items()
            if name not in _OWN and is_plain(value)
        ]
        self._named = [f"{path}.{name}" for path, _, name, _ in entries]
        self._homes: list[Mapping[str, Any]] = [home for _, home, _, _ in entries]
        self._names = [name for _, _, name, _ in entries]
        self._values = [copy.deepcopy(value) for _, _, _, value in entries]
        self._packed = [module for module in self._modules if hasattr(module, "structure")]
        self._structures = list(map(_structure, self._packed))
        self._tensors = self._now()

    def _now(self) -> list[tuple[Any, ...]]:
        return [
            (id(one), one.data_ptr(), one.requires_grad, one.dtype)
            for module in self._modules
            for table in (module._parameters, module._buffers)
            for one in table.values()
            if one is not None
        ]

    def changed(self) -> str | None:
        """Name something that is not as it was; None if all is."""
        if list(map(id, self.model.modules())) != list(map(id, self._modules)):
            return "which layers there are"
        if list(map(id, map(_structure, self._packed))) != list(map(id, self._structures)):
            return "which weights are kept"
        if self._now() != self._tensors:
            return "where parameters and buffers are"
        values = list(map(dict.get, self._homes, self._names))  # type: ignore[arg-type]
        if values == self._values:
            return None
        at = next(i for i, (new, old) in enumerate(zip(values, self._values, strict=True)) if new != old)
        return self._named[at]

    def refusal(self) -> str | None:
        """Why no step of the model can be recorded now, as a clause."""
        if isinstance(self.model, DistributedDataParallel):
            return "gradients travel between processes"
        if any(GLOBAL_HOOKS):
            return "there are hooks on all modules, which a replay does not call"
        if any(self._tables):
            for path, module in zip(self._paths, self._modules, strict=True):
                if watched(module):
                    return f"{path} has hooks, which a replay does not call"
        for one in self.parameters:
            if one._backward_hooks or getattr(one, "_post_accumulate_grad_hooks", None):
                return "a parameter has hooks, which a replay does not call"
        if any(getattr(module, "dense_gradient", None) is not None for module in self._packed):
            return _COLLECTING
        return None


def _structure(module: nn.Module) -> object:
    return module.structure


def _as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _kind_of(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What batches that share a recording have in common."""
    shapes = tuple((one.shape, one.dtype, one.stride(), one.device) for one in tensors)
    kind = tensors[0].device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (*shapes, cast)


def _own_memory(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients laid out as their parameters, none of them in memory of another one: they are added to."""
    taken = {one.data_ptr() for one in (*parameters, *inputs)}
    result: list[Tensor | None] = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            if gradient.stride() != parameter.stride() or gradient.data_ptr() in taken:
                gradient = torch.empty_like(parameter).copy_(gradient)
            taken.add(gradient.data_ptr())
            gradient = gradient.detach()
        result.append(gradient)
    return result
