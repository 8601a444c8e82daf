"""Write a network in each format, and load the file back as a network.

- safetensors: every parameter and buffer in the dense layout, under the names of the state dict.
- torch: a torch.export program (.pt2), which runs without the code of the network.
- onnx: input ``images`` [batch, C, H, W], output ``logits`` [batch, K]; needs the optional packages.
- openvino: OpenVINO's own form (.xml, weights in the .bin beside it), made from the ONNX program.
- executorch: an ExecuTorch program (.pte) for phones and small devices, on XNNPACK, one image a call.
- coreml: a Core ML program (.mlpackage), one image a call; they run on macOS only.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clicktrain.deploy.comparison import Run
from clicktrain.errors import UserError

Format: TypeAlias = Literal["safetensors", "onnx", "torch", "openvino", "executorch", "coreml"]


@dataclass(frozen=True)
class FileFormat:
    """A kind of file.

    Attributes:
        suffix: of its name.
        write: (network in evaluation mode, example [2, C, H, W], path, facts as JSON).
        read: (network, path) -> the file as a network; some files do not say how it is built.
        engine: what runs it.
        needs: packages, by the names that they are imported and installed under.
        second: suffix of a second file beside it.
        whole_folder: it is a folder.
        platform: ``sys.platform`` of the only system on which it runs.
    """

    suffix: str
    write: Callable[[nn.Module, Tensor, Path, str], None]
    read: Callable[[nn.Module, Path], Run]
    engine: str
    needs: tuple[str, ...] = ()
    second: str | None = None
    whole_folder: bool = False
    platform: str | None = None

    def check(self, name: str) -> None:
        """UserError if it cannot be written and run here."""
        if self.platform is not None and sys.platform != self.platform:
            raise UserError(
                f"export to {name} cannot be checked here: {self.engine} runs on {self.platform} only: "
                "export there, from the run's folder"
            )
        missing = [package for package in self.needs if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"export to {name} needs {', '.join(missing)}: run 'pip install {' '.join(missing)}'"
            )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide what other packages warn of about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_safetensors(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write the state dict, shared tensors too, with ``facts`` as metadata."""
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "clicktrain": facts})


def read_safetensors(model: nn.Module, path: Path) -> nn.Module:
    """Load the weights of the file into a copy of the network, whose own are gone first."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(load_file(path))
    return other


def capture(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Capture the network as a program: of any batch size for a batch of 2 and more, of one image for one.

    Raises:
        UserError: PyTorch cannot.
    """
    free = len(example) > 1
    try:
        with _without_warnings():
            return torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},) if free else None
            )
    except Exception as error:  # the network's own code may raise anything when it is traced
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"torch.export cannot capture this network: {type(error).__name__}: {first}"
        ) from error


def write_torch(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write the program, with ``facts`` as the extra file ``clicktrain``."""
    torch.export.save(capture(model, example), path, extra_files={"clicktrain": facts})


def read_torch(model: nn.Module, path: Path) -> nn.Module:
    """Load the program."""
    return torch.export.load(path).module()


def write_onnx(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write one file with the weights inside and ``facts`` as metadata."""
    # It warns at every export that torchvision operators are missing.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    captured = capture(model, example)
    with _without_warnings():
        program = torch.onnx.export(
            captured, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
    assert program is not None  # it is None only for the old exporter, which writes by itself
    program.model.metadata_props["clicktrain"] = facts
    program.save(path, external_data=False)


def read_onnx(model: nn.Module, path: Path) -> Run:
    """Load the file into ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def write_openvino(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write ``.xml`` and, beside it, ``.bin`` in float32; ``facts`` are its runtime information."""
    import openvino

    with tempfile.TemporaryDirectory(prefix="clicktrain-") as folder:
        program = Path(folder) / "network.onnx"
        write_onnx(model, example, program, facts)
        network = openvino.Core().read_model(program)
        network.set_rt_info(facts, ["clicktrain"])
        openvino.save_model(network, path, compress_to_fp16=False)


def read_openvino(model: nn.Module, path: Path) -> Run:
    """Compile it for the CPU, in float32: it would take bfloat16 where the processor has it."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(np.array(compiled([x.numpy()])[0]))


def write_executorch(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write the program for one image a call; it has no place for ``facts``.

    Memory is planned when it is written, for all images of a call: a program of any number would need that of
    the most.
    """
    captured = capture(model, example[:1])
    with _without_warnings(), _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = to_edge_transform_and_lower(captured, partitioner=[XnnpackPartitioner()]).to_executorch()
    path.write_bytes(program.buffer)


def read_executorch(model: nn.Module, path: Path) -> Run:
    """Load it into ExecuTorch's runtime on this processor."""
    with _without_warnings(), _quiet():
        from executorch.runtime import Runtime

        method: Any = Runtime.get().load_program(path).load_method("forward")
    # A result lies in the program's memory until the next call.
    return lambda x: torch.cat(
        [method.execute([x[i : i + 1].contiguous()])[0].clone() for i in range(len(x))]
    )


def write_coreml(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write the program for one image a call, in float32, with ``facts`` as metadata."""
    captured = capture(model, example[:1])
    with _without_warnings(), _quiet():
        import coremltools

        captured = captured.run_decompositions({})
        program = coremltools.convert(
            captured,
            minimum_deployment_target=coremltools.target.iOS16,
            compute_precision=coremltools.precision.FLOAT32,
        )
    program.user_defined_metadata["clicktrain"] = facts
    program.save(str(path))


def read_coreml(model: nn.Module, path: Path) -> Run:
    """Load it into Core ML, on macOS."""
    import coremltools

    program = coremltools.models.MLModel(str(path))
    (given,) = (one.name for one in program.get_spec().description.input)

    def run(x: Tensor) -> Tensor:
        found = [next(iter(program.predict({given: one[None]}).values())) for one in x.numpy()]
        return torch.cat([torch.from_numpy(np.array(one)) for one in found])

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters log of their progress off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


FILE_FORMATS: dict[Format, FileFormat] = {
    "safetensors": FileFormat(".safetensors", write_safetensors, read_safetensors, "PyTorch"),
    "onnx": FileFormat(
        ".onnx", write_onnx, read_onnx, "ONNX Runtime", needs=("onnx", "onnxscript", "onnxruntime")
    ),
    "torch": FileFormat(".pt2", write_torch, read_torch, "torch.export"),
    "openvino": FileFormat(
        ".xml",
        write_openvino,
        read_openvino,
        "OpenVINO",
        needs=("openvino", "onnx", "onnxscript"),
        second=".bin",
    ),
    "executorch": FileFormat(
        ".pte", write_executorch, read_executorch, "ExecuTorch with XNNPACK", needs=("executorch",)
    ),
    "coreml": FileFormat(
        ".mlpackage",
        write_coreml,
        read_coreml,
        "Core ML",
        needs=("coremltools",),
        whole_folder=True,
        platform="darwin",
    ),
}
"""By name, as the command line has it."""
