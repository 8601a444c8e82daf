"""Engines that run a network: each makes a call without arguments for given images, threads and precision."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from clicktrain.bench.inference.case import Networks
from clicktrain.bench.timing import autocast, channels_last
from clicktrain.compiler import accelerate, dtypes_worth_measuring
from clicktrain.deploy.c_folder import load_module, write_c
from clicktrain.deploy.file_formats import write_onnx
from clicktrain.errors import UserError
from clicktrain.inference.calibration import calibrate
from clicktrain.inference.capture import capture
from clicktrain.kernels.native import missing_toolchain, toolchain

Call: TypeAlias = Callable[[], Any]
"""Runs the network; returns what `Engine.read` makes logits of."""
_ISAS = {"8": "avx2", "4": "sse2"}
"""Instructions of the C folder where ``CLICKTRAIN_LANES`` asks for narrower vectors than the processor's."""
CALIBRATION = 128
"""Images that int8 scales are found on."""


@dataclass(frozen=True)
class Engine:
    """One way to run a network.

    Attributes:
        make: (networks, images [N, C, H, W], threads, precision) -> a call.
        precisions: what it can compute in.
        needs: packages, by the name they are imported under.
        needs_compiler: it builds C code here.
        sparse: it leaves pruned weights out.
    """

    make: Callable[[Networks, Tensor, int, str], Call]
    precisions: Sequence[str] = ("fp32",)
    needs: Sequence[str] = ()
    needs_compiler: bool = False
    sparse: bool = False
    needs_for: Mapping[str, str] | None = None

    def refusal(self, precision: str) -> str | None:
        """Why it cannot run here; None if it can."""
        if precision not in self.precisions:
            return f"it does not compute in {precision}"
        more = (
            [] if self.needs_for is None else [self.needs_for[p] for p in (precision,) if p in self.needs_for]
        )
        missing = [name for name in (*self.needs, *more) if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} is not installed"
        if self.needs_compiler and toolchain() is None:
            return missing_toolchain()
        return None


def read(result: Any) -> Tensor:
    """Logits [N, K] in float64 of what a call has returned."""
    if isinstance(result, Tensor):
        return result.double()
    return torch.from_numpy(np.array(result)).double()


def _torch(networks: Networks, x: Tensor, threads: int, precision: str) -> Call:
    model, x = channels_last(copy.deepcopy(networks.dense), x.clone())

    @torch.inference_mode()
    def call() -> Tensor:
        with autocast(precision == "bf16"):
            result: Tensor = model(x)
        return result

    return call


def _torch_compile(networks: Networks, x: Tensor, threads: int, precision: str) -> Call:
    """Inductor with freezing: weights are constants, norms are folded, layouts are chosen at compile time."""
    import torch._inductor.config as settings

    model, x = channels_last(copy.deepcopy(networks.dense), x.clone())
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)

    def call() -> Tensor:
        with torch.no_grad(), autocast(precision == "bf16"):
            return compiled(x)

    with settings.patch(freezing=True):
        call()
    return call


def _clicktrain(networks: Networks, x: Tensor, threads: int, precision: str) -> Call:
    fast = accelerate(copy.deepcopy(networks.packed), x, dtypes=dtypes_worth_measuring(precision == "bf16"))
    fast.eval()

    @torch.inference_mode()
    def call() -> Tensor:
        with autocast(precision == "bf16"):
            result: Tensor = fast(x)
        return result

    return call


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="clicktrain-bench-"))


def _c_file(networks: Networks) -> Path:
    """The Python file of the network's C export, whose library is built beside it."""
    if "c" not in networks.files:
        images = networks.case.images(1)
        path = networks.files["c"] = _folder() / "model.py"
        program = capture(networks.dense, images.shape[1:])
        ranges = calibrate(program, torch.split(networks.case.images(CALIBRATION), 16))
        write_c(networks.dense, program, path.parent, {}, images, ranges=ranges)
        load_module(path).build()
    return networks.files["c"]


def _clicktrain_c(networks: Networks, x: Tensor, threads: int, precision: str) -> Call:
    """With a plan that is measured here, as `accelerate` does it; of as wide vectors as that has."""
    path = _c_file(networks)
    plan = path.with_name(f"{precision}-{len(x)}.plan")
    narrow = _ISAS.get(os.environ.get("CLICKTRAIN_LANES", ""))
    if narrow is not None and precision != "fp32":
        raise UserError(f"with {narrow} it does not compute in {precision}")
    isa = narrow if precision == "fp32" else f"avx512-{precision}"
    network = load_module(path).Network(max_batch=len(x), isa=isa, threads=threads, plan=plan)
    images = x.numpy()
    return lambda: network(images)


def _onnx_file(networks: Networks) -> Path:
    """The dense network in an ONNX file, for any batch."""
    if "onnx" not in networks.files:
        path = networks.files["onnx"] = _folder() / "network.onnx"
        write_onnx(networks.dense, networks.case.images(2), path, "")
    return networks.files["onnx"]


def _onnxruntime(networks: Networks, x: Tensor, threads: int, precision: str) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(_onnx_file(networks), options, providers=["CPUExecutionProvider"])
    feed = {"images": x.numpy()}
    return lambda: session.run(["logits"], feed)[0]


def _int8_file(networks: Networks) -> Path:
    """The dense network quantized after training by NNCF, for any batch."""
    if "int8" not in networks.files:
        import nncf
        import openvino

        images = networks.case.images(CALIBRATION).numpy()
        model = openvino.Core().read_model(_onnx_file(networks))
        model = nncf.quantize(model, nncf.Dataset([images[i : i + 1] for i in range(len(images))]))
        path = networks.files["int8"] = _folder() / "network.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
    return networks.files["int8"]


def _openvino(networks: Networks, x: Tensor, threads: int, precision: str) -> Call:
    """By its own defaults for latency, the batch a constant."""
    import openvino

    core = openvino.Core()
    model = core.read_model(_int8_file(networks) if precision == "int8" else _onnx_file(networks))
    model.reshape(list(x.shape))
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request, feed = compiled.create_infer_request(), [x.numpy()]

    def call() -> Any:
        request.infer(feed, share_inputs=True)
        return request.get_output_tensor().data

    return call


ENGINES: dict[str, Engine] = {
    "clicktrain-c": Engine(_clicktrain_c, ("fp32", "bf16", "int8"), needs_compiler=True, sparse=True),
    "clicktrain": Engine(_clicktrain, ("fp32", "bf16"), needs_compiler=True, sparse=True),
    "torch": Engine(_torch, ("fp32", "bf16")),
    "torch-compile": Engine(_torch_compile, ("fp32", "bf16"), needs_compiler=True),
    "onnxruntime": Engine(_onnxruntime, ("fp32",), ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Engine(
        _openvino,
        ("fp32", "bf16", "int8"),
        ("openvino", "onnx", "onnxscript", "onnxruntime"),
        needs_for={"int8": "nncf"},
    ),
}
"""By name, as rows have it."""
