"""Run folders as the trainer leaves them, with made-up but plausible contents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from clicktrain.runs.format import FORMAT_VERSION, HEADER

# The twelve patterns of a pool that was generated on CIFAR-10, in the order of their scores.
POOL_BITS = (27, 54, 216, 432, 58, 178, 184, 154, 30, 51, 408, 240)
STAGES = ("dense", "pool", "finalize", "regularize", "accelerated")
SHARES = (0.30, 0.05, 0.05, 0.10)  # of the run: stage 1, 2, 3, 4


def resnet_layers(blocks: int = 3, width: int = 16) -> list[dict[str, Any]]:
    """Names, shapes and output sizes of a CIFAR ResNet with 6 * blocks + 2 layers."""
    layers = [{"name": "conv1", "shape": [width, 3, 3, 3], "side": 32}]
    channels, side = width, 32
    for stage in range(3):
        filters = width * 2**stage
        side = 32 // 2**stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            layers.append({"name": f"{name}.conv1", "shape": [filters, channels, 3, 3], "side": side})
            layers.append({"name": f"{name}.conv2", "shape": [filters, filters, 3, 3], "side": side})
            if channels != filters:
                layers.append(
                    {"name": f"{name}.downsample.0", "shape": [filters, channels, 1, 1], "side": side}
                )
            channels = filters
    return layers


def make_run(
    folder: Path,
    *,
    method: str = "clicktrain",
    compression: float = 8.0,
    epochs: int = 60,
    seed: int = 0,
    accuracy: float = 87.1,
    stop_after: int | None = None,
    layers: list[dict[str, Any]] | None = None,
    classes: list[str] | None = None,
    given_pool: bool = False,
    settings: dict[str, Any] | None = None,
    seconds_per_epoch: float = 11.5,
) -> Path:
    """Write a run folder; ``stop_after`` leaves it unfinished after that many epochs."""
    rng = np.random.default_rng(seed + 1000 * int(compression))
    layers = layers or resnet_layers()
    pruned = method != "dense"
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(method, compression, epochs, seed) | (settings or {})
    text = f"{HEADER}{FORMAT_VERSION}\n" + yaml.safe_dump(config, sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    decided = _decide(layers, compression, rng) if pruned else None
    costs = _costs(layers, decided)
    starts = np.cumsum([0.0, *SHARES]) * epochs
    done = epochs if stop_after is None else stop_after
    metrics = _metrics(done, epochs, accuracy, pruned, starts, costs, rng, seconds_per_epoch)
    events = _events(starts, done, decided, compression, given_pool) if pruned else []
    _write_lines(folder / "metrics.jsonl", metrics)
    _write_lines(folder / "events.jsonl", events)
    if stop_after is None:
        _write_weights(folder, layers, decided, classes, rng)
        summary = _summary(config, metrics, layers, decided, costs, starts)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return folder


def _config(method: str, compression: float, epochs: int, seed: int) -> dict[str, Any]:
    config = {
        "model": "resnet20", "width": 1.0, "stem": "auto", "data": "cifar10:data", "image_size": None,
        "method": method, "epochs": epochs, "batch_size": 128, "optimizer": "sgd", "learning_rate": 0.1,
        "schedule": "onecycle", "label_smoothing": 0.1, "precision": "bf16", "device": "auto",
        "milestones": [0.5, 0.75], "seed": seed,
    }  # fmt: skip
    if method == "clicktrain":
        config |= {
            "compression": compression,
            "preset": "default",
            "patterns": 12,
            "pool": "dynamic",
            "layers": {},
        }
    return config


def _decide(
    layers: list[dict[str, Any]], compression: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Kernels per filter and patterns per kernel for every layer but the first."""
    decided = []
    for i, layer in enumerate(layers[1:]):
        f, c, r, s = layer["shape"]
        entries = 1 if r == 1 else 4
        wanted = r * s / entries / compression * (1.6 - 0.6 * min(1.0, 1.5 * i / len(layers)))
        kernels = max(1, min(c, int(c * wanted)))
        weights = np.exp(-0.22 * np.arange(12) + 0.35 * rng.standard_normal(12))
        ids = rng.choice(12, size=(f, c), p=weights / weights.sum())
        kept = np.zeros((f, c), dtype=bool)
        favourites = rng.gamma(0.7, size=c)
        for row in range(f):
            order = np.argsort(-(favourites + rng.gamma(0.7, size=c)))
            kept[row, order[:kernels]] = True
        counts = np.bincount(ids[kept], minlength=12).tolist() if r > 1 else []
        decided.append(
            {**layer, "kernels": kernels, "entries": entries, "ids": ids, "kept": kept, "counts": counts}
        )
    return decided


def _mask(layer: dict[str, Any]) -> np.ndarray:
    _, _, r, s = layer["shape"]
    if r == 1:
        return layer["kept"][:, :, None, None]
    pool = np.array([[b >> i & 1 for i in range(r * s)] for b in POOL_BITS], dtype=bool).reshape(-1, r, s)
    return pool[layer["ids"]] & layer["kept"][:, :, None, None]


def _costs(layers: list[dict[str, Any]], decided: list[dict[str, Any]] | None) -> dict[str, tuple[int, ...]]:
    """Name -> (dense forward FLOPs, forward FLOPs, non-zero weights, weights)."""
    alive = {d["name"]: int(_mask(d).sum()) for d in decided or []}
    costs = {}
    for layer in layers:
        size = math.prod(layer["shape"])
        left = alive.get(layer["name"], size)
        costs[layer["name"]] = (2 * size * layer["side"] ** 2, 2 * left * layer["side"] ** 2, left, size)
    return costs


def _metrics(done, epochs, accuracy, pruned, starts, costs, rng, seconds) -> list[dict[str, Any]]:
    dense_step = 3 * sum(cost[0] for cost in costs.values()) * 40_000
    sparse_step = 3 * sum(cost[1] for cost in costs.values()) * 40_000
    density = sum(c[2] for c in costs.values()) / sum(c[3] for c in costs.values()) if pruned else 1.0
    spent, lines = 0.0, []
    for epoch in range(1, done + 1):
        t = epoch / epochs
        shares = _stage_shares(epoch, starts) if pruned else {"dense": 1.0}
        fixed = shares.get("accelerated", 0.0)
        spent += dense_step * (1 - fixed) + sparse_step * fixed
        dip = 9 * math.exp(-0.45 * (epoch - starts[4])) if pruned and epoch > starts[4] else 0.0
        level = accuracy - 47 * math.exp(-9 * t) - 9 * (1 - t) ** 1.5 * (1 + 0.5 * math.sin(7 * epoch)) * 0.6
        val = level - dip + float(rng.normal(0, 0.35)) * (1 - t)
        train_loss = 0.62 + 1.5 * math.exp(-7 * t) + 0.45 * (1 - t) ** 1.3 + 0.05 * dip
        wait = seconds * 0.012 * (1 + 0.3 * float(rng.random()))
        lines.append(
            {
                "epoch": epoch, "stage": next(reversed(shares)), "stages": shares,
                "train_loss": train_loss, "train_accuracy": min(99.0, val + 4 * t),
                "val_loss": train_loss * 0.92 + 0.02 * dip, "val_accuracy": round(val, 2),
                "density": density if pruned and epoch >= starts[4] else 1.0,
                "sparsity": 1 - density if pruned and epoch >= starts[4] else 0.0,
                "learning_rate": _one_cycle(t),
                "batch_size": 128,
                "seconds": seconds * (1 + 0.03 * float(rng.random()) - 0.35 * fixed),
                "data_seconds": wait, "step_ms_median": 1000 * seconds / 312 * (1 - 0.35 * fixed),
                "train_flops": int(spent), "train_flops_dense": int(dense_step * epoch),
            }
        )  # fmt: skip
    if done == epochs and lines:
        lines[-1]["val_accuracy"] = accuracy
    return lines


def _one_cycle(t: float) -> float:
    return 0.1 * (t / 0.3 if t < 0.3 else 0.5 * (1 + math.cos(math.pi * (t - 0.3) / 0.7)))


def _stage_shares(epoch: int, starts: np.ndarray) -> dict[str, float]:
    bounds = [*starts, math.inf]
    shares = {}
    for stage, begin, end in zip(STAGES, bounds[:-1], bounds[1:], strict=True):
        share = min(epoch, end) - max(epoch - 1, begin)
        if share > 1e-9:
            shares[stage] = float(share)
    return shares


def _events(starts, done, decided, compression, given_pool) -> list[dict[str, Any]]:
    reached = _compression(decided)
    scores = [round(1_900_000 * 0.86**i) for i in range(12)]
    patterns = [
        {"bits": b, "score": None if given_pool else s} for b, s in zip(POOL_BITS, scores, strict=True)
    ]
    pools = [{"shape": [3, 3], "patterns": patterns, "candidates": 0 if given_pool else 57}]
    if any(d["shape"][2] == 1 for d in decided):
        pools.append({"shape": [1, 1], "patterns": [{"bits": 1, "score": None}], "candidates": 0})
    layers = [
        {
            "name": d["name"], "shape": d["shape"], "kernels_per_filter": d["kernels"],
            "nnz_per_filter": d["kernels"] * d["entries"],
            "density": d["kernels"] * d["entries"] / math.prod(d["shape"][1:]), "pattern_counts": d["counts"],
        }
        for d in decided
    ]  # fmt: skip
    told = [
        ("stage", starts[1], {"stage": "pool", "number": 2, "reason": "30% of the run is over"}),
        ("pool", starts[2], {"pools": pools}),
        ("stage", starts[2], {"stage": "finalize", "number": 3, "reason": "its length is over"}),
        (
            "finalised",
            starts[3],
            {"layers": layers, "compression_asked": compression, "compression_reached": reached},
        ),
        ("stage", starts[3], {"stage": "regularize", "number": 4, "reason": "its length is over"}),
        (
            "hard_prune",
            starts[4],
            {"compression_asked": compression, "compression_reached": reached, "energy_outside": 0.034},
        ),
        ("stage", starts[4], {"stage": "accelerated", "number": 5, "reason": "its length is over"}),
    ]
    return [
        {"event": name, "step": round(epoch * 312), "epoch": float(epoch), **rest}
        for name, epoch, rest in told
        if epoch <= done
    ]


def _compression(decided: list[dict[str, Any]]) -> float:
    size = 432 + sum(math.prod(d["shape"]) for d in decided)
    return size / (432 + sum(int(_mask(d).sum()) for d in decided))


def _write_weights(folder, layers, decided, classes, rng) -> None:
    masks = {d["name"]: _mask(d) for d in decided or []}
    tensors, values = {}, {}
    for layer in layers:
        weight = rng.standard_normal(layer["shape"]).astype(np.float32) * 0.1 + 1e-6
        mask = masks.get(layer["name"])
        if mask is not None:
            weight = weight * mask
        tensors[f"{layer['name']}.weight"] = weight
        values[layer["name"]] = weight[weight != 0]
    tensors["fc.weight"] = rng.standard_normal((10, 64)).astype(np.float32)
    names = classes or [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    facts = {"model": "resnet20", "image_shape": [3, 32, 32], "classes": names}
    metadata = {"format_version": str(FORMAT_VERSION), "clicktrain": json.dumps(facts)}
    save_file(tensors, folder / "model.safetensors", metadata)
    save_file(values, folder / "packed.safetensors", metadata)


def _summary(config, metrics, layers, decided, costs, starts) -> dict[str, Any]:
    dense, left = (sum(cost[i] for cost in costs.values()) for i in (0, 1))
    weights = sum(math.prod(layer["shape"]) for layer in layers)
    alive = sum(cost[2] for cost in costs.values())
    last = metrics[-1]
    return {
        "format_version": FORMAT_VERSION, "method": config["method"], "model": config["model"],
        "data": config["data"],
        "epochs": config["epochs"], "seed": config["seed"], "val_accuracy": last["val_accuracy"],
        "best_val_accuracy": max(line["val_accuracy"] for line in metrics),
        "compression_asked": config.get("compression"), "compression_ratio": weights / alive,
        "train_flops": last["train_flops"],
        "train_flops_ratio": last["train_flops"] / last["train_flops_dense"],
        "inference_flops": left, "inference_flops_ratio": left / dense,
        "train_seconds": sum(line["seconds"] for line in metrics) * 1.06,
        "data_share": sum(m["data_seconds"] for m in metrics) / sum(m["seconds"] for m in metrics),
        "hard_prune_epoch": float(starts[4]) if decided else None,
        "parameters": weights + 650, "nonzero_parameters": alive + 650, "device": "cpu",
        "cpu": "AMD EPYC 9R14 96-Core Processor", "gpu": None,
        "versions": {"python": "3.11.9", "torch": "2.13.0+cpu", "clicktrain": "0.1.0", "numpy": "2.4.6"},
        "layers": [_layer(layer, costs[layer["name"]], decided) for layer in layers]
        + [{"name": "fc", "shape": [10, 64], "density": 1.0, "nnz_per_filter": 64, "forward_flops": 1280,
            "forward_flops_dense": 1280, "operator": "dense"}],
    }  # fmt: skip


def _layer(
    layer: dict[str, Any], cost: tuple[int, ...], decided: list[dict[str, Any]] | None
) -> dict[str, Any]:
    size = math.prod(layer["shape"])
    is_pruned = any(d["name"] == layer["name"] for d in decided or [])
    return {
        "name": layer["name"], "shape": layer["shape"], "density": cost[2] / size,
        "nnz_per_filter": cost[2] // layer["shape"][0],
        "forward_flops": cost[1], "forward_flops_dense": cost[0],
        "operator": "packed reference" if is_pruned else "dense",
    }  # fmt: skip


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_shrinking_run(
    folder: Path,
    *,
    every: int = 10,
    epochs: int = 60,
    accuracy: float = 87.0,
    batch_grows: bool = True,
    removed: tuple[str, ...] = ("layer3.2.conv1", "layer3.2.conv2"),
    stop_after: int | None = None,
) -> Path:
    """A run of PruneTrain: channels go every ``every`` epochs, most of them early, half of them in all."""
    make_run(folder, method="prunetrain", epochs=epochs, accuracy=accuracy, stop_after=stop_after)
    layers = resnet_layers()
    done = epochs if stop_after is None else stop_after

    def left(epoch: int) -> float:
        """Share of the channels in the network that epoch ``epoch`` trains."""
        return 0.5 + 0.5 * 0.5 ** ((epoch - 1) // every)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        share = left(line["epoch"])
        batch = 128 + (32 * ((line["epoch"] - 1) // every) if batch_grows else 0)
        line |= {
            "stage": "sparsify", "stages": {"sparsify": 1.0}, "batch_size": batch,
            "memory_bytes": round(2_000_000 * share * batch + 4_000_000 * share**2),
            "memory_calibration": 0.8,
            "batch_norm_bytes": round(1_000_000 * share * batch),
            "gradient_bytes": round(1_000_000 * share**2),
            "gradient_bytes_epoch": round(1_000_000 * share**2) * (40_000 // batch),
            "parameters": round(270_000 * share**2), "train_flops_per_image": round(240e6 * share**2),
            "inference_flops_per_image": round(80e6 * share**2),
        }  # fmt: skip
    _write_lines(folder / "metrics.jsonl", lines)
    events: list[dict[str, Any]] = [
        {"event": "penalty", "step": 312, "epoch": 1.0, "coefficient": 1e-4, "penalty_ratio": 0.25}
    ]
    for epoch in range(every, done + 1, every):
        before, after = left(epoch), left(epoch + 1)
        gone = removed if epoch == every else ()
        rows = [
            {
                "name": layer["name"],
                "inputs": [max(1, round(layer["shape"][1] * s)) for s in (before, after)],
                "outputs": [max(1, round(layer["shape"][0] * s)) for s in (before, after)],
                "stays": "",
            }
            for layer in layers
            if layer["name"] not in removed or epoch == every
        ]
        events.append(
            {
                "event": "reconfigured", "step": 312 * epoch, "epoch": float(epoch), "seconds": 0.25,
                "channels_before": sum(row["outputs"][0] for row in rows),
                "channels_after": sum(row["outputs"][1] for row in rows if row["name"] not in gone),
                "layers_removed": list(gone), "layers": rows, "max_output_change": 3e-6,
            }
        )  # fmt: skip
        if batch_grows and epoch < done:
            batch = 128 + 32 * (epoch // every)
            events.append(
                {
                    "event": "batch_resized", "step": 312 * epoch, "epoch": epoch, "batch_size": batch,
                    "learning_rate_factor": batch / 128, "memory_estimated": 255_000_000,
                    "memory_budget": 260_000_000,
                }
            )  # fmt: skip
    _write_lines(folder / "events.jsonl", events)
    return folder


def make_pat_run(folder: Path, *, chosen: int = 14) -> Path:
    """A run of pruning-aware training: the indicator rises over its threshold, and channels go at once."""
    make_run(folder, method="pat", epochs=30, accuracy=85.0)
    events: list[dict[str, Any]] = [
        {
            "event": "epi",
            "step": 312 * e,
            "epoch": float(e),
            "epi": 1 - 0.5 * 0.85**e if e > 1 else None,
            "threshold": 0.944,
            "window": 5,
        }
        for e in range(1, chosen + 1)
    ]
    events.append({"event": "trigger", "step": 312 * chosen, "epoch": float(chosen), "prune_epoch": chosen})
    events.append(
        {
            "event": "reconfigured", "step": 312 * (chosen + 1), "epoch": chosen + 1.0, "seconds": 0.4,
            "channels_before": 688, "channels_after": 400, "layers_removed": [], "layers": [],
            "max_output_change": None,
        }
    )  # fmt: skip
    _write_lines(folder / "events.jsonl", events)
    return folder
