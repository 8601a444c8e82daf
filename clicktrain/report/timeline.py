"""The decisions of a run in words, one line per event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clicktrain import wording
from clicktrain.report.layers import outcome_rows
from clicktrain.report.run_data import Run, number
from clicktrain.report.stages import STAGE_NAMES


@dataclass(frozen=True, slots=True)
class Moment:
    """When, what, and more about it; ``css`` is the color of a stage that begins."""

    epoch: str
    title: str
    detail: str
    css: str = ""


_ELSEWHERE = ("epi",)
"""Events of every epoch, which a figure shows."""


def timeline(run: Run, most: int = 60) -> tuple[Moment, ...]:
    """The first ``most`` events of a run."""
    shown = [event for event in run.events if event.get("event") not in _ELSEWHERE]
    return tuple(_moment(event) for event in shown[:most])


def _moment(event: Mapping[str, Any]) -> Moment:
    name = str(event.get("event"))
    at = wording.epoch(number(event, "epoch"))
    if name == "stage":
        stage = str(event.get("stage"))
        title = f"stage {event.get('number', '')}: {STAGE_NAMES.get(stage, stage)}"
        css = f"stage-{stage}" if stage in STAGE_NAMES else ""
        return Moment(at, title, str(event.get("reason") or ""), css)
    if name == "switch":
        return Moment(at, f"{event.get('method')} begins", str(event.get("reason") or ""))
    if name in _DETAILS:
        title, detail_of = _DETAILS[name]
        return Moment(at, title, detail_of(event))
    known = ("event", "step", "epoch")
    detail = ", ".join(f"{key} {_short(value)}" for key, value in event.items() if key not in known)
    return Moment(at, name.replace("_", " "), detail if len(detail) < 200 else detail[:199] + "…")


def _chosen(event: Mapping[str, Any]) -> str:
    return f"{len(event.get('layers') or ())} layers{_compression(event)}{_latency(event)}"


def _hard_prune(event: Mapping[str, Any]) -> str:
    lost = number(event, "energy_outside")
    energy = "" if lost is None else f"; {wording.percent(lost, 1)} of the weights’ energy was cut"  # noqa: RUF001
    return _compression(event).removeprefix(", ") + energy


def _dropped(event: Mapping[str, Any]) -> str:
    sparsity = wording.percent(number(event, "sparsity"), 1)
    return f"{wording.integer(number(event, 'dropped'))} weights, to a sparsity of {sparsity}"


def _admm(event: Mapping[str, Any]) -> str:
    away = wording.percent(number(event, "residual"), 1)
    which = f"iteration {event.get('iteration')} of {event.get('iterations')} begins"
    return f"{which}, rho {_short(number(event, 'rho'))}; weights are {away} of their norm away from them"


def _outcome(event: Mapping[str, Any]) -> str:
    return "; ".join(row.sentence for row in outcome_rows(event.get("targets"))) or "nothing was asked for"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _latency(event: Mapping[str, Any]) -> str:
    """What a latency target came to; nothing where there was none."""
    wanted, measured = number(event, "latency_target_ms"), number(event, "measured_ms")
    if wanted is None:
        return ""
    took = f"measured {measured:.3g} ms, " if measured is not None else ""
    return f"; {took}asked {wanted:.3g} ms"


def _operators(event: Mapping[str, Any]) -> str:
    layers = event.get("layers")
    names = [str(name) for name in layers.values()] if isinstance(layers, Mapping) else []
    counts = Counter(names).most_common()
    rule = f", by the rule '{event['rule']}'" if event.get("rule") else ""
    kept = "; activations kept in bf16" if event.get("activations") == "bf16" else ""
    return wording.sentence_list([f"{count} × {name}" for name, count in counts]) + rule + kept  # noqa: RUF001


def _pools(event: Mapping[str, Any]) -> str:
    parts = []
    for pool in event.get("pools") or ():
        count, shape = len(pool.get("patterns") or ()), wording.shape(pool.get("shape"))
        candidates = number(pool, "candidates") or 0
        among = f" of {candidates:.0f} candidates" if candidates else ""
        parts.append(f"{count} pattern{'' if count == 1 else 's'}{among} for {shape} kernels")
    return wording.sentence_list(parts)


def _removed(event: Mapping[str, Any]) -> str:
    before, after = number(event, "channels_before"), number(event, "channels_after")
    if before == after:
        return "none could go"
    layers = len(event.get("layers_removed") or ())
    text = f"{wording.integer(before)} → {wording.integer(after)} channels"
    unrounded = number(event, "channels_without_rounding")
    if unrounded is not None and after is not None and after > unrounded:
        text += f" ({wording.integer(after - unrounded)} kept for widths in {event.get('round_to')}s)"
    return text + (f", {layers} layer{'' if layers == 1 else 's'} gone" if layers else "")


def _widths(event: Mapping[str, Any]) -> str:
    """The multiple that was chosen, and its price."""
    rows = {row.get("multiple"): row for row in event.get("rows") or ()}
    first, chosen = rows.get(1), rows.get(event.get("chosen"))
    if first is None or chosen is None:
        return ""
    if chosen is first:
        return "no multiple trains faster than the widths as they are"
    ms, first_ms = number(chosen, "ms"), number(first, "ms")
    channels, first_channels = number(chosen, "channels"), number(first, "channels")
    if ms is None or channels is None or not first_ms or not first_channels:
        return ""
    return (
        f"in {event['chosen']}s: a step takes {wording.percent(ms / first_ms, 0)} of the time, for "
        f"{wording.percent(channels / first_channels - 1, 1)} more channels"
    )


def _larger(event: Mapping[str, Any]) -> str:
    factor = number(event, "learning_rate_factor")
    text = f"{wording.integer(number(event, 'batch_size'))} images"
    return text if factor is None else f"{text}, learning rate × {factor:.3g}"  # noqa: RUF001


def _compression(event: Mapping[str, Any]) -> str:
    asked, reached = number(event, "compression_asked"), number(event, "compression_reached")
    if reached is None:
        return ""
    return f", compression {wording.times(reached)}" + (f" (asked {wording.times(asked)})" if asked else "")


def _restart(event: Mapping[str, Any]) -> str:
    text = f"at {wording.percent(number(event, 'height'))} of its peak"
    damage = number(event, "damage")
    return text if damage is None else f"{text} (damage by {event.get('rule')}: {damage:.2f})"


def _norms(event: Mapping[str, Any]) -> str:
    return f"over {wording.integer(number(event, 'batches'))} batches"


def _planned(event: Mapping[str, Any]) -> str:
    asked, planned = number(event, "seconds_asked"), number(event, "seconds_planned")
    return (
        f"{wording.integer(number(event, 'epochs'))} epochs, {wording.duration(planned)} planned of "
        f"{wording.duration(asked)}"
    )


_DETAILS = {
    "pool": ("pattern pool chosen", _pools),
    "finalised": ("patterns and kernels chosen", _chosen),
    "hard_prune": ("hard prune", _hard_prune),
    "dropped": ("weights dropped", _dropped),
    "admm": ("auxiliary weights updated", _admm),
    "reconfigured": ("channels removed", _removed),
    "widths": ("widths measured", _widths),
    "batch_resized": ("larger batches", _larger),
    "operators": ("operators chosen", _operators),
    "time_planned": ("length chosen", _planned),
    "learning_rate_restart": ("learning rate restarts", _restart),
    "norms_recalibrated": ("batch norm statistics measured again", _norms),
    "outcome": ("the end", _outcome),
}
