"""A run as a report sees it: the files of its folder, read once. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from clicktrain.errors import UserError
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.format import parse_facts, read_robustness, read_summary


def number(values: Mapping[str, Any] | None, key: str) -> float | None:
    """A finite number of a record, or None."""
    value = None if values is None else values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class Run:
    """One run folder: flat settings, a line of metrics per finished epoch, and decisions in their order.

    ``label`` is unique in a report; ``summary`` is None while the run is not finished.
    """

    label: str
    folder: Path
    config: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.summary is not None

    @property
    def method(self) -> str:
        """Name of the method, as in the settings."""
        return str((self.summary or {}).get("method") or self.config.get("method") or "unknown")

    @property
    def method_name(self) -> str:
        """Name of the method, as people write it, with the preset if it is not the default one."""
        from clicktrain.methods import METHODS  # brings torch: reading a folder does not need it

        name = METHODS[self.method].title if self.method in METHODS else self.method
        preset = self.config.get("preset")
        return f"{name} ({preset})" if preset not in (None, "default") else name

    @property
    def is_dense(self) -> bool:
        """Whether this is a baseline that prunes nothing."""
        return self.method == "dense"

    @property
    def epochs_done(self) -> int:
        """Finished epochs."""
        return int(number(self.metrics[-1], "epoch") or 0) if self.metrics else 0

    @property
    def epochs_asked(self) -> int:
        """Epochs of the whole run."""
        return int(number(self.summary, "epochs") or number(self.config, "epochs") or self.epochs_done)

    @property
    def accumulate(self) -> int:
        """Batches of a step of the optimizer."""
        return int(number(self.config, "accumulate") or 1)

    @property
    def task(self) -> tuple[str, ...]:
        """Network, width, stem, data and image size: accuracies of runs with the same task are comparable."""
        keys = ("model", "width", "stem", "data", "image_size")
        return tuple(str(self.config.get(key)) for key in keys)

    def column(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of every epoch that has the value."""
        pairs = ((number(line, "epoch"), number(line, key)) for line in self.metrics)
        return [(epoch, value) for epoch, value in pairs if epoch is not None and value is not None]

    def _reached(self, key: str, column: str) -> float | None:
        """From the summary; for an unfinished run, from its last finished epoch."""
        if self.summary is not None:
            return number(self.summary, key)
        values = self.column(column)
        return values[-1][1] if values else None

    @property
    def accuracy(self) -> float | None:
        """Top-1 validation accuracy at the end, percent."""
        return self._reached("val_accuracy", "val_accuracy")

    @property
    def best_accuracy(self) -> float | None:
        """Highest top-1 validation accuracy of any epoch, percent."""
        values = [value for _, value in self.column("val_accuracy")]
        return number(self.summary, "best_val_accuracy") or max(values, default=None)

    @property
    def compression(self) -> float | None:
        """All convolution weights / nonzero ones."""
        if self.summary is not None:
            return number(self.summary, "compression_ratio")
        density = self._reached("", "density")
        return 1 / density if density else None

    @property
    def compression_asked(self) -> float | None:
        """The compression ratio that was asked for, if any; with a latency as the target it comes out."""
        if any(number(self.config, key) for key in ("latency_target", "latency_target_ms")):
            return None
        return number(self.summary, "compression_asked") or number(self.config, "compression")

    @property
    def train_flops_ratio(self) -> float | None:
        """Training FLOPs of the run as it happened (so far) / those of dense training.

        Of a finished run that started from the weights of another, the FLOPs of both.
        """
        if self.summary is not None:
            total = number(self.summary, "total_train_flops_ratio")
            return number(self.summary, "train_flops_ratio") if total is None else total
        done, dense = self._reached("", "train_flops"), self._reached("", "train_flops_dense")
        return done / dense if done is not None and dense else None

    @property
    def train_flops_ratio_nominal(self) -> float | None:
        """As `train_flops_ratio`, with masked weights that cost nothing while masks move either.

        None for runs that did not count it.
        """
        if self.summary is None:
            done, dense = self._reached("", "train_flops_nominal"), self._reached("", "train_flops_dense")
            return done / dense if done is not None and dense else None
        own, executed = (number(self.summary, f"train_flops_ratio{part}") for part in ("_nominal", ""))
        total = self.train_flops_ratio
        if own is None or executed is None or total is None:
            return None
        # What the initial weights have cost counts as it was executed.
        before, spent = (number(self.summary, key) or 0.0 for key in ("initial_train_flops", "train_flops"))
        return total * (before + spent * own / executed) / (before + spent) if spent and executed else own

    @property
    def inference_flops_ratio(self) -> float | None:
        """FLOPs of one prediction / those of the dense network."""
        return number(self.summary, "inference_flops_ratio")

    @property
    def step_ms(self) -> tuple[float, float] | None:
        """Median milliseconds of a step before any pruning and after the hard prune, if both are known."""
        steps = (self.summary or {}).get("step_ms")
        if not isinstance(steps, Mapping):
            return None
        before, after = number(steps, "dense"), number(steps, "accelerated")
        return (before, after) if before and after else None

    @property
    def seconds(self) -> float | None:
        """Wall clock of the run; for an unfinished one, the sum over its epochs."""
        if self.summary is not None:
            return number(self.summary, "train_seconds")
        values = [value for _, value in self.column("seconds")]
        return sum(values) if values else None

    @property
    def total_seconds(self) -> float | None:
        """The same; of a finished run that started from the weights of another, of both if that is known."""
        total = number(self.summary, "total_train_seconds")
        return self.seconds if total is None else total

    @property
    def data_share(self) -> float | None:
        """Part of the training time spent waiting for images."""
        if (share := number(self.summary, "data_share")) is not None:
            return share
        whole = sum(value for _, value in self.column("seconds"))
        waited = self.column("data_seconds")
        return sum(value for _, value in waited) / whole if waited and whole else None

    @property
    def hard_prune_epoch(self) -> float | None:
        """Epoch of the hard prune."""
        return number(self.summary, "hard_prune_epoch") or number(self.event("hard_prune"), "epoch")

    @property
    def device(self) -> str:
        """Name of the processor or GPU that trained."""
        summary = self.summary or {}
        asked = self.config.get("device")
        known = summary.get("gpu") or summary.get("cpu") or summary.get("device")
        return str(known or (asked if asked not in (None, "auto") else ""))

    def event(self, name: str) -> Mapping[str, Any] | None:
        """The last event of that name."""
        return next((e for e in reversed(self.events) if e.get("event") == name), None)

    @property
    def layers(self) -> tuple[Mapping[str, Any], ...]:
        """Layers of the summary: name, shape, density, FLOPs."""
        layers = (self.summary or {}).get("layers")
        return tuple(layer for layer in layers or () if isinstance(layer, Mapping))

    @cached_property
    def robustness(self) -> dict[str, list[tuple[float, float]]]:
        """Attack -> (epsilon, accuracy in percent), rising; empty if the run was not attacked."""
        return read_robustness(RunFolder(self.folder).robustness)

    @cached_property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> shape of its convolution weight; empty without model.safetensors."""
        path = self.folder / "model.safetensors"
        if not path.is_file():
            return {}
        with _opened(path) as file:
            names = [key for key in file.keys() if key.endswith(".weight")]  # noqa: SIM118
            shapes = {key.removesuffix(".weight"): tuple(file.get_slice(key).get_shape()) for key in names}
        return {name: shape for name, shape in shapes.items() if len(shape) == 4}

    def keep(self, layer: str) -> NDArray[np.bool_]:
        """Mask of a convolution in `weight_shapes`: bool [F, C, R, S], True = kept (not zero)."""
        mask: NDArray[np.bool_] = self.weight(layer) != 0
        return mask

    def weight(self, layer: str) -> NDArray[Any]:
        """Weight of a convolution in `weight_shapes`: [F, C, R, S]."""
        with _opened(self.folder / "model.safetensors") as file:
            weight: NDArray[Any] = file.get_tensor(f"{layer}.weight")
        return weight

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Facts of the network in model.safetensors: image_shape, classes and so on."""
        path = self.folder / "model.safetensors"
        if not path.is_file():
            return {}
        with _opened(path) as file:
            return parse_facts(file.metadata() or {}, path)

    def file_bytes(self, name: str) -> int | None:
        """Size of a file of the folder, None if it is not there."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError):
        raise UserError(f"{path} is damaged: it is not a safetensors file") from None


def read_runs(paths: Sequence[str | Path]) -> tuple[Run, ...]:
    """Read run folders, in the order given.

    Raises:
        UserError: no folder given, a folder that holds no run, or a damaged file in one.
    """
    if not paths:
        raise UserError("a report needs at least one run folder")
    folders = [Path(path) for path in paths]
    real = [folder.resolve() for folder in folders]
    twice = next((f for i, f in enumerate(folders) if real[i] in real[:i]), None)
    if twice is not None:
        raise UserError(f"{twice} is given twice: give each run folder once")
    return tuple(_read(folder, label) for folder, label in zip(folders, _labels(real), strict=True))


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as distinguish them."""
    for depth in range(1, 1 + max(len(folder.parts) for folder in folders)):
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return [label.encode("utf-8", "replace").decode("utf-8") for label in labels]


def _read(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of a run, as in runs/NAME")
    own = RunFolder(folder)
    records = tuple(own.read_metrics()), tuple(own.read_events())
    return Run(label, folder, own.read_settings(), *records, read_summary(own.summary_path))


def kernel_density(keep: NDArray[np.bool_]) -> float:
    """Share of kernels that keep at least one weight; ``keep`` is bool [F, C, R, S]."""
    return float(keep.any(axis=(2, 3)).mean())
