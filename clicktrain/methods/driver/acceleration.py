"""A user's network on the fast kernels, as long as its layers are packed: its calls become another's."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from clicktrain.accounting import count
from clicktrain.compiler import Accelerated, LoweringPlan, accelerate, dtypes_worth_measuring
from clicktrain.compiler.renewal import SHORT_FLOPS, still_fits
from clicktrain.errors import UserError
from clicktrain.graph import Inputs, own_random_numbers
from clicktrain.graph.plain_calls import plain_calls
from clicktrain.kernels.native import missing_toolchain, toolchain
from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.methods.driver.publisher import MasksFrozen, Notification, ParametersReplaced, Publisher
from clicktrain.runs.events import OperatorsEvent


class Acceleration:
    """Has ``model(x)`` run on fast kernels from the packing of its layers on, until they are unpacked.

    `clicktrain.compiler.accelerate` makes a view of the model at its first call in training mode after
    packing, from that call's inputs, and calls of the model go to the view: they serve every mode, number and
    size of images, memory format and autocast. ``state_dict``, hooks, ``train()`` and parameters are the
    model's own; copies and pickles of it are plain.

    The way is the one that ``Module.compile`` takes, ``_compiled_call_impl``: PyTorch leaves it out of copies
    and pickles. A model that was compiled so keeps its own.

    Args:
        model: the network.
        publisher: of what happens to it.
        record: takes the event that says what was chosen.
        batches_left: number of batches that are still to be trained on.
        always: also where little is left to compute. False leaves short runs alone, whose time would go into
            choosing and building kernels.
    """

    def __init__(
        self,
        model: nn.Module,
        publisher: Publisher,
        record: Callable[[OperatorsEvent], object],
        batches_left: Callable[[], int],
        always: bool,
    ) -> None:
        self._model, self._record, self._batches_left, self._always = model, record, batches_left, always
        self._view: Accelerated | None = None
        self._given_up = self._stood_in = False
        self.plan: LoweringPlan | None = None
        """What was chosen, and is used again where layers are packed again."""
        self._calls = _Calls(model, self)
        self._handle = publisher.subscribe(self._changed, (ParametersReplaced, MasksFrozen))
        if always and (reason := unable(model)):
            warnings.warn(f"the network will not be accelerated: {reason}", stacklevel=5)

    def state_dict(self) -> dict[str, str]:
        """The plan, so that a resumed run uses the same operators, bit for bit; nothing before it is made."""
        return {} if self.plan is None else {"operators": self.plan.to_json()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what a saved run had chosen; call it before layers are packed again."""
        self._view = None
        self.plan = LoweringPlan.from_json(saved["operators"]) if "operators" in saved else None

    def _changed(self, change: Notification) -> None:
        if not any(isinstance(module, PackedLayer) for module in self._model.modules()):
            self._take_back()
            return
        if (
            isinstance(change, MasksFrozen)
            and self._view is not None
            and not still_fits(self._view.plan, self._model)
        ):
            self._view = self.plan = None  # a gradual method: many weights have left since it was made
        if not self._given_up:
            self._put_in()

    def _put_in(self) -> None:
        own = self._model.__dict__
        if own.get("_compiled_call_impl") in (None, self._calls):
            own["_compiled_call_impl"] = self._calls
            self._stood_in = True
        elif self._always:
            self._given_up = True
            warnings.warn(
                "the network is not accelerated, as its calls are compiled: leave out model.compile(), or "
                "give attach accelerate=False",
                stacklevel=2,
            )

    def _take_back(self) -> None:
        if self._model.__dict__.get("_compiled_call_impl") is self._calls:
            del self._model.__dict__["_compiled_call_impl"]
        self._view = None

    def remove(self) -> None:
        """Give the model its own calls back, for good."""
        if self._always and self._stood_in and self.plan is None and not self._given_up:
            warnings.warn(
                "no call of the packed network was accelerated: it was compiled (torch.compile), not trained "
                "any more, or run by its forward() alone",
                stacklevel=4,
            )
            self._given_up = True
        self._handle.remove()
        self._take_back()

    def view_for(self, args: Any, kwargs: Any) -> Accelerated | None:
        """What a call goes to; None for the model's own."""
        if self._view is None and self._model.training and not self._given_up:
            with plain_calls(self._model):  # making a view runs the model
                self._view = self._made(Inputs(args, kwargs))
            if self._view is None:
                self._given_up = True
                self._take_back()
        return self._view

    def _made(self, inputs: Inputs) -> Accelerated | None:
        """A view of the model, None where there is none or where it is not worth its while."""
        tensors = inputs.tensors()
        if unable(self._model) or not tensors or tensors[0].shape[:1] in ((), (0,)):
            return None
        inputs = inputs.map(torch.Tensor.detach)
        short = self._flops_left(inputs) < SHORT_FLOPS
        if short and not self._always:
            return None
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        try:
            with torch.autocast("cpu", enabled=False):
                view = accelerate(
                    self._model,
                    inputs,
                    rule="density" if short else "measured",
                    plan=self.plan,
                    dtypes=dtypes_worth_measuring(autocast),
                )
        except UserError as error:  # the model does not run on its inputs: its own call says so best
            warnings.warn(f"the network is not accelerated: {error}", stacklevel=5)
            return None
        if not view.active:
            return None
        if self.plan is None:
            plan = self.plan = view.plan
            event = OperatorsEvent(rule=plan.rule, activations=plan.activations, layers=plan.operators())
            self._record(event)
        return view

    def _flops_left(self, inputs: Inputs) -> float:
        """Dense training FLOPs of what is still to be trained, about."""
        with own_random_numbers(), torch.autocast("cpu", enabled=False):
            one = count(self._model, inputs).training_flops_dense
        return float(one * inputs.tensors()[0].shape[0] * self._batches_left())


class _Calls:
    """What stands in a model for its calls; it keeps nothing alive."""

    def __init__(self, model: nn.Module, acceleration: Acceleration) -> None:
        self._model, self._acceleration = weakref.ref(model), weakref.ref(acceleration)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, acceleration = self._model(), self._acceleration()
        assert model is not None
        if acceleration is None or torch.compiler.is_compiling():
            return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        view = acceleration.view_for(args, kwargs)
        if view is None:
            return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        return view(*args, **kwargs)


def unable(model: nn.Module) -> str | None:
    """Why no network of this kind can be accelerated here, None if it can."""
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type != "cpu":
        return f"it is on {parameter.device.type}, and the fast kernels are for CPUs"
    return missing_toolchain() if toolchain() is None else None
