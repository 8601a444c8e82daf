"""The end of a run: final weights, packed weights and the summary."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.accounting import LayerCost, ModelCost, count
from clicktrain.accounting.cost import ratio
from clicktrain.comm.agreement import of_first
from clicktrain.data import Loader
from clicktrain.errors import MissedTarget
from clicktrain.formats.packed_file import save_packed
from clicktrain.formats.tree import save_tree
from clicktrain.latency.machine import cpu_name, gpu_name, versions
from clicktrain.methods.driver.publisher import ChannelsRemoved, MasksFrozen
from clicktrain.methods.outcome import Outcome
from clicktrain.runs.format import FORMAT_VERSION
from clicktrain.surgery import SurgeryPlan, write_recipe
from clicktrain.train.after_cut import recalibrate_
from clicktrain.train.epoch import check_outputs, note_accuracy
from clicktrain.train.evaluate import Evaluation, evaluate
from clicktrain.train.exchange import run_figures
from clicktrain.train.operators import operator_names
from clicktrain.train.prepare import make_eval_loader
from clicktrain.train.time_budget import time_target
from clicktrain.train.training_run import TrainingRun


def finish_run(run: TrainingRun) -> dict[str, Any]:
    """Write model.safetensors, packed.safetensors and, last, summary.json.

    It can be repeated: a run that is killed in here is finished when it is resumed.
    """
    p = run.prepared
    changes: list[object] = []
    p.pruner.subscribe(changes.append, (ChannelsRemoved, MasksFrozen))
    operators = operator_names(run.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissedTarget)  # they are in the summary, from where they are shown
        plain = p.pruner.finish()
    model = plain if run.average is None else run.average.module  # unpacked and masked as the network is
    masks = p.pruner.masks
    if p.config.recalibrate_norms and (changes or run.average is not None):
        recalibrate_(run, model, epoch=p.config.epochs)
    if changes:  # what was evaluated is not what is saved
        result = _evaluated(run, model, p.val_loader)
        check_outputs(run, result)
        note_accuracy(run, result.accuracy)
        run.progress.message(f"pruned after the last epoch: validation accuracy is {result.accuracy:.2f}%")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format_version": str(FORMAT_VERSION), "clicktrain": json.dumps(p.facts)}
    if p.processes.first:
        if p.pruner.plans:
            write_recipe(run.folder.surgery, p.pruner.plans)
        save_tree(run.folder.model, weights, metadata)
        save_packed(run.folder.packed, weights, {name: mask.cpu() for name, mask in masks.items()}, metadata)
    # Zeros outside frozen masks cost as much as any weight; they only count in the compression.
    test_accuracy = _test_accuracy(run, model)
    image = torch.zeros(1, *p.data.image_shape, device=p.device)
    cost = count(model, image, masks)
    summary = _summary(run, cost, cost if masks else count(model, image), operators, test_accuracy)
    run.logs.finish(summary)
    run.folder.write_summary(summary)
    return summary


def _test_accuracy(run: TrainingRun, model: nn.Module) -> float | None:
    """Accuracy on the test images, percent, where validation images were held out of the training images."""
    p = run.prepared
    if p.data.test is None:
        return None
    loader = make_eval_loader(p.config, p.data, "test", p.device, p.processes)
    return _evaluated(run, model, loader).accuracy


def _evaluated(run: TrainingRun, model: nn.Module, loader: Loader) -> Evaluation:
    config, device = run.prepared.config, run.prepared.device
    views = config.test_time_augmentation
    result = evaluate(model, loader, device=device, precision=config.precision, views=views, shared=True)
    assert result is not None  # only a stop that is asked for gives none
    return result


def _summary(
    run: TrainingRun,
    cost: ModelCost,
    living: ModelCost,
    operators: Mapping[str, str],
    test_accuracy: float | None,
) -> dict[str, Any]:
    p, state = run.prepared, run.state
    config, pruner, masks, outcome = p.config, p.pruner, p.pruner.masks, p.pruner.outcome()
    seconds, views = run.seconds, config.test_time_augmentation
    if state.seconds_asked is not None:
        row = time_target(state.seconds_asked, state.seconds_planned or 0.0, seconds, config.epochs)
        outcome = Outcome((*outcome.targets, row))
    hard_prune = next((event["epoch"] for event in pruner.events if event["event"] == "hard_prune"), None)
    compression, nominal = getattr(p.method, "compression_asked", None), state.train_flops_nominal
    return {
        "format_version": FORMAT_VERSION,
        "method": config.method,
        "model": config.model,
        "data": config.data,
        "epochs": config.epochs,
        "seed": config.seed,
        "val_accuracy": state.val_accuracy,
        "best_val_accuracy": state.best_val_accuracy,
        "test_accuracy": test_accuracy,
        **({} if views == "none" else {"test_time_augmentation": views}),
        "sparsity_asked": None if compression is not None else getattr(p.method, "sparsity", None),
        "compression_asked": compression,
        "outcome": outcome.to_json(),
        "warnings": list(outcome.warnings),
        "compression_ratio": ratio(p.cost.initial.conv_weights, living.conv_nonzero),
        "conv_weights": p.cost.initial.conv_weights,
        "nonzero_conv_weights": living.conv_nonzero,
        "train_flops": state.train_flops,
        "train_flops_ratio": state.train_flops / max(state.train_flops_dense, 1),
        "train_flops_nominal": nominal,
        "train_flops_ratio_nominal": None if nominal is None else nominal / max(state.train_flops_dense, 1),
        "initial_train_flops": state.earlier.flops,
        "total_train_flops_ratio": state.earlier.total_ratio(state.train_flops, state.train_flops_dense),
        "inference_flops": cost.forward_flops,
        "inference_flops_ratio": cost.forward_flops / max(p.cost.initial.forward_flops_dense, 1),
        "train_seconds": seconds,
        "initial_train_seconds": state.earlier.seconds,
        "total_train_seconds": state.earlier.total_seconds(seconds),
        "step_ms": _step_ms(run.folder.read_metrics()),
        "data_share": state.data_seconds / max(state.epoch_seconds, 1e-9),
        "hard_prune_epoch": hard_prune,
        "parameters": cost.parameters,
        "nonzero_parameters": living.nonzero_parameters,
        "dense_parameters": p.cost.initial.parameters,
        "file_bytes": of_first(lambda: _file_bytes(run)),
        "channels_removed": channels_removed(p.pruner.plans),
        **run_figures(state, p.processes.number, _gradient_bytes(run)),
        "layers_removed": [name for plan in p.pruner.plans for name in plan.removed_names],
        "device": p.device.type,
        "cpu": cpu_name(),
        "gpu": gpu_name(p.device),
        "versions": versions(),
        "layers": [_layer(layer, masks.get(layer.name), operators, config.packed) for layer in cost.layers],
    }


def _file_bytes(run: TrainingRun) -> dict[str, int]:
    """Bytes of the files of weights, by name."""
    paths = (run.folder.model, run.folder.packed)
    return {path.name: path.stat().st_size for path in paths if path.exists()}


def _gradient_bytes(run: TrainingRun) -> int:
    """Bytes of the gradients of the network as it was at first."""
    size = next(run.prepared.model.parameters()).element_size()
    return run.prepared.cost.initial.parameters * size


def channels_removed(plans: Sequence[SurgeryPlan]) -> int:
    """Output channels that were removed, including those of removed layers."""
    rows = [(row.outputs, row.name in plan.removed_names) for plan in plans for row in plan.layers]
    return sum(before - (0 if removed else after) for (before, after), removed in rows)


def _step_ms(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median milliseconds of a step, for each stage that filled whole epochs: before and after pruning."""
    by_stage: dict[str, list[float]] = {}
    for line in metrics:
        stages, milliseconds = line.get("stages", ()), line.get("step_ms_median")
        if len(stages) == 1 and milliseconds is not None:
            by_stage.setdefault(next(iter(stages)), []).append(milliseconds)
    return {stage: statistics.median(times) for stage, times in by_stage.items()}


def _layer(layer: LayerCost, mask: Tensor | None, chosen: Mapping[str, str], packed: bool) -> dict[str, Any]:
    per_filter: int | None = layer.weights // layer.weight_shape[0]
    operator = "dense"
    if mask is not None:
        kept = mask.flatten(1).sum(dim=1)
        per_filter = int(kept[0]) if bool((kept == kept[0]).all()) else None
        operator = "packed reference" if packed and len(layer.weight_shape) == 4 else "dense, masked"
    return {
        "name": layer.name,
        "shape": list(layer.weight_shape),
        "density": layer.nonzero / max(layer.weights, 1),
        "nnz_per_filter": per_filter,
        "forward_flops": layer.forward_flops,
        "forward_flops_dense": layer.forward_flops_dense,
        "operator": chosen.get(layer.name) or operator,
    }
