"""Times of all networks of a frontier on this machine, in one go: steps, evaluations, latencies, planning.

All that is compared takes turns in one process (`clicktrain.latency.timer`); what a stage costs beyond the
dense step is measured in pairs with it; planning, compiling and peak memory in processes of their own.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from clicktrain.bench.frontier.alone import measure_alone
from clicktrain.bench.frontier.lines import Line
from clicktrain.bench.frontier.networks import (
    LATENCY_BATCHES,
    Engine,
    Network,
    dense_network,
    inference_engines,
    pruned_network,
)
from clicktrain.bench.frontier.recipe import Recipe
from clicktrain.bench.frontier.trainer_steps import (
    ENDLESS,
    STEPS_PER_EPOCH,
    TrainerSteps,
    drawn_images,
)
from clicktrain.bench.timing import Progress, fastest
from clicktrain.errors import UserError
from clicktrain.kernels.native import keep_memory
from clicktrain.latency.machine import describe
from clicktrain.latency.timer import candidates_ms, clock_of, median_ms
from clicktrain.methods import Dense
from clicktrain.runs.events import DroppedEvent, RegrownEvent, ThresholdEvent
from clicktrain.train.config import RunConfig
from clicktrain.train.prepare import make_train_loader, open_run_data

REHEARSAL_STEPS = 80
"""Steps in which a method goes through its stages."""
UPDATE_INTERVAL = 4
"""Steps between changes of masks in a rehearsal, of methods that have such a setting."""
CHOICE_SECONDS, CHOICE_ROUNDS = 4.0, (2, 5)
"""For choosing the fastest engine of a network."""
_CPU = torch.device("cpu")

Times = dict[str, Any]
"""``machine, settings, networks: {key: figures}``; dense networks by `Network.key`, pruned ones by cell."""


@dataclass(frozen=True)
class TimingSettings:
    """How carefully times are measured.

    Attributes:
        rounds: timings of which the median is taken.
        alone: also measure planning with compiling, and peak memory, in processes of their own.
        stages: also measure what stages cost that are neither dense nor frozen.
    """

    rounds: int = 7
    alone: bool = True
    stages: bool = True


def measure_times(
    recipe: Recipe,
    lines: Mapping[tuple[str, int], Line],
    settings: TimingSettings = TimingSettings(),
    progress: Progress = lambda text: None,
    save: Callable[[Times], None] = lambda times: None,
) -> Times:
    """Measure every network of the cells that have a finished run.

    ``save`` is called once with what is there before planning and memory are measured.

    Raises:
        UserError: no run is finished.
    """
    done = [
        (cell, line)
        for cell in recipe.cells
        if (line := next((lines[k] for k in _keys(cell) if _is_finished(lines.get(k))), None))
    ]
    if not done:
        raise UserError("no run is finished yet: there is nothing to time")
    torch.set_num_threads(int(done[0][0].settings["threads"]))
    keep_memory()
    dense = {network.key: network for network in (dense_network(cell, line) for cell, line in done)}
    pruned = {
        cell.name: pruned_network(cell, line)
        for cell, line in done
        if line["structure"] and not line["network"]["channels_removed"]
    }
    began = time.perf_counter()
    engines = _choose_engines(dense, recipe.engines, progress)
    steps = _steps(dense, pruned, engines, recipe.engines, progress)
    figures: dict[str, dict[str, Any]] = {key: {"engine": str(next(iter(engines[key])))} for key in dense}
    figures |= {name: {"engine": str(steps[name][0])} for name in pruned}
    progress(f"timing steps of {len(steps)} networks")
    clock = clock_of(_CPU)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for key, (_, one) in steps.items():
        calls[key, "step_ms"], calls[key, "evaluate_ms"] = one.step, one.evaluate
    for (key, what), ms in median_ms(calls, settings.rounds, warmup=2, clock=clock).items():
        figures[key][what] = ms
    for key, own in engines.items():
        best, eager = next(iter(own)), _eager(own)
        figures[key]["eager_step_ms"] = figures[key]["step_ms"] * own[eager] / own[best]
        figures[key]["candidates"] = {str(engine): ms for engine, ms in own.items()}
    for _, one in steps.values():
        one.close()
    del calls, steps
    _latencies({**dense, **pruned}, recipe.engines, settings.rounds, figures, progress)
    for cell, line in done:
        if cell.kind == "pruned" and settings.stages:
            network, known = dense_network(cell, line), figures.setdefault(cell.name, {})
            method = cell.config(line["seed"])[1]
            try:
                known["stages"] = _rehearse(method, network, _eager(engines[network.key]), line, progress)
            except UserError as error:  # on drawn images pruning may destroy a network
                known["not_rehearsed"] = str(error)
    head = {"family": recipe.family, "machine": describe(_CPU)}
    if settings.alone:
        save({**_result(head, replace(settings, alone=False), began), "networks": figures})
        for key, network in {**dense, **pruned}.items():
            progress(f"{key}: planning and memory, in processes of their own")
            try:
                figures[key] |= measure_alone(network, figures[key]["engine"])
            except RuntimeError as error:  # hours of other times are not lost with it
                figures[key]["not_measured"] = str(error)[-500:]
    return {**_result(head, settings, began), "networks": figures}


def _result(head: Mapping[str, Any], settings: TimingSettings, began: float) -> Times:
    return {**head, "settings": asdict(settings), "seconds": round(time.perf_counter() - began, 1)}


def _keys(cell: Any) -> list[tuple[str, int]]:
    return [(cell.name, seed) for seed in cell.seeds]


def _is_finished(line: Line | None) -> bool:
    return line is not None and line["status"] == "finished"


def _eager(engines: Iterable[Engine]) -> Engine:
    """The fastest engine that is not compiled."""
    return next(engine for engine in engines if not engine.compiled)


def expected_seconds(config: RunConfig) -> float:
    """Seconds of one core that training a run's dense network takes in its own precision, about."""
    data = open_run_data(config)
    facts = {"classes": len(data.classes), "image_shape": list(data.image_shape)}
    ms = _brief_step_ms(replace(drawn_images(config, facts, STEPS_PER_EPOCH), epochs=ENDLESS, seed=0))
    return ms / 1000 * config.epochs * len(make_train_loader(config, data, _CPU))


@functools.cache
def _brief_step_ms(config: RunConfig) -> float:
    steps = TrainerSteps(replace(config, method="dense"), Dense())
    steps.step()
    ms = median_ms({"step": steps.step}, 3, clock=clock_of(_CPU))["step"]
    steps.close()
    return ms


# ---- dense and frozen networks ------------------------------------------------------------------


def _choose_engines(
    dense: Mapping[str, Network], kinds: tuple[str, ...], progress: Progress
) -> dict[str, dict[Engine, float]]:
    """Milliseconds of a step of each dense network in each engine, fastest first."""
    chosen = {}
    for key, network in dense.items():
        progress(f"{key}: choosing the engine of training")
        steps = {engine: network.steps(engine) for engine in network.engines(kinds)}
        times = _briefly({engine: one.step for engine, one in steps.items()})
        if "compile" in kinds:
            best = replace(min(times, key=lambda engine: times[engine]), compiled=True)
            progress(f"{key}: compiling it")
            steps[best] = network.steps(best)
            times = _briefly(
                {engine: steps[engine].step for engine in (replace(best, compiled=False), best)}
            ) | {engine: ms for engine, ms in times.items() if engine != replace(best, compiled=False)}
        for one in steps.values():
            one.close()
        chosen[key] = dict(sorted(times.items(), key=lambda pair: pair[1]))
    return chosen


def _briefly(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    for call in calls.values():
        call()  # what is made once is made here
    return candidates_ms(calls, CHOICE_SECONDS, CHOICE_ROUNDS, rivals=dict.fromkeys(calls, "network"))


def _steps(
    dense: Mapping[str, Network],
    pruned: Mapping[str, Network],
    engines: Mapping[str, Mapping[Engine, float]],
    kinds: tuple[str, ...],
    progress: Progress,
) -> dict[str, tuple[Engine, TrainerSteps]]:
    """Training of every network in its fastest engine."""
    steps = {}
    for name, network in pruned.items():
        progress(f"{name}: planning")
        own = {Engine(kind): network.steps(Engine(kind)) for kind in kinds if kind != "compile"}  # type: ignore[arg-type]
        times = _briefly({engine: one.step for engine, one in own.items()})
        best = min(times, key=lambda engine: times[engine])
        for engine, one in own.items():
            if engine != best:
                one.close()
        steps[name] = (best, own[best])
    # Compiled ones last: making a network forgets what was compiled before.
    fastest_of = {key: next(iter(engines[key])) for key in dense}
    for key in sorted(dense, key=lambda key: fastest_of[key].compiled):
        steps[key] = (fastest_of[key], dense[key].steps(fastest_of[key]))
    return steps


def _latencies(
    networks: Mapping[str, Network],
    kinds: tuple[str, ...],
    rounds: int,
    figures: Mapping[str, dict[str, Any]],
    progress: Progress,
) -> None:
    """Latency of every network and batch in its fastest engine; a pruned one may also run as a dense one."""
    for batch in LATENCY_BATCHES:
        best: dict[str, tuple[str, Callable[[], object]]] = {}
        for key, network in networks.items():
            progress(f"{key}: choosing the engine of inference, batch {batch}")
            calls: dict[str, Callable[[], object]] = {
                str(engine): network.inference(engine, batch) for engine in inference_engines(kinds)
            }
            for precision in kinds:
                fast = None if precision == "compile" else network.fast_inference(precision == "bf16", batch)
                if fast is not None:
                    calls[f"accelerated {precision}"] = fast
            times = _briefly(calls)
            if "compile" in kinds and not network.masks:
                eager = next(e for e in inference_engines(kinds) if str(e) == fastest(times)[0])
                calls[str(replace(eager, compiled=True))] = network.inference(
                    replace(eager, compiled=True), batch
                )
                times |= _briefly({n: c for n, c in calls.items() if n not in times or n == str(eager)})
            name = fastest(times)[0]
            best[key] = name, calls[name]
        progress(f"timing inference, batch {batch}")
        repeat = 5 if batch == 1 else 1
        times = median_ms(
            {key: call for key, (_, call) in best.items()}, 3 * rounds, repeat=repeat, warmup=2,
            clock=clock_of(_CPU),
        )  # fmt: skip
        for key, ms in times.items():
            figures[key][f"latency_ms_b{batch}"] = ms
            figures[key][f"latency_engine_b{batch}"] = best[key][0]


# ---- stages that are neither dense nor frozen ---------------------------------------------------


def _rehearse(
    method: Any, network: Network, engine: Engine, line: Line, progress: Progress
) -> dict[str, list[dict[str, float]]]:
    """What steps cost over a dense step in the same engine, taken in pairs, by stage.

    The method goes through its stages within few steps. Only stages that the run was in are looked at.

    Returns:
        Stage -> rows of ``density, ratio`` (of a step without a change of masks), ``update_ratio`` (of one
        with), ``steps``.
    """
    wanted = {phase["stage"] for phase in line["phases"] if not phase["frozen"] and phase["stage"] != "dense"}
    if not wanted:
        return {}
    progress(f"{line['name']}: rehearsing {', '.join(sorted(wanted))}")
    if any(field.name == "interval" for field in fields(method)):
        method = replace(method, interval=UPDATE_INTERVAL)
    config = replace(
        drawn_images(network.config, network.facts, STEPS_PER_EPOCH),
        epochs=REHEARSAL_STEPS // STEPS_PER_EPOCH, method=line["method"], precision=engine.precision,
        channels_last=engine.layout == "channels_last", augment=network.config.augment,
    )  # fmt: skip
    dense = network.steps(engine)
    own = TrainerSteps(config, method)
    pruner, clock, now = own.run.prepared.pruner, clock_of(_CPU), [0]

    def note(event: object) -> None:
        now[0] += 1

    handle = pruner.subscribe(note, (RegrownEvent, DroppedEvent, ThresholdEvent))
    samples: list[tuple[str, float, bool, float]] = []
    dense.step()
    _ = own.accelerated  # planning, if a network begins on fast operators, is part of no step
    for _ in range(REHEARSAL_STEPS):
        stage, updates, density = own.stage, now[0], own.density
        begin = clock()
        own.step()
        middle = clock()
        if own.frozen:
            break
        if stage in wanted:
            dense.step()
            samples.append((stage, density, now[0] > updates, (middle - begin) / (clock() - middle)))
    handle.remove()
    dense.close()
    own.close()
    return {stage: _rows([s[1:] for s in samples if s[0] == stage]) for stage in sorted(wanted)}


def _rows(samples: Sequence[tuple[float, bool, float]]) -> list[dict[str, float]]:
    """Medians of the ratios, by density in steps of 5%."""
    rows = []
    for near in sorted({round(20 * density) for density, _, _ in samples}, reverse=True):
        here = [(update, ratio) for density, update, ratio in samples if round(20 * density) == near]
        plain = [ratio for update, ratio in here if not update]
        updates = [ratio for update, ratio in here if update]
        ratio = statistics.median(plain or updates)
        rows.append(
            {
                "density": near / 20,
                "ratio": ratio,
                "update_ratio": statistics.median(updates) if updates else ratio,
                "steps": len(here),
            }
        )
    return rows
