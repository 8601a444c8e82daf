"""What is measured in a process that does nothing else: planning with compiling, and peak memory."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict

import torch

from clicktrain.bench.frontier.networks import Engine, Network
from clicktrain.bench.frontier.structure import describe_masks, similar_masks
from clicktrain.bench.memory import output_of_fresh_process, peak_mb
from clicktrain.train.config import RunConfig

_MODULE = "clicktrain.bench.frontier.alone"


def measure_alone(network: Network, engine: str) -> dict[str, float]:
    """``memory_mb``: peak of a training step beyond an empty process. Of a pruned network also
    ``plan_seconds``: choosing and compiling its operators with nothing kept from before, by CPU time.
    """
    job = {
        "key": network.key,
        "config": asdict(network.config),
        "facts": dict(network.facts),
        "structure": describe_masks(network.masks),
        "engine": engine,
        "threads": torch.get_num_threads(),
    }
    result = {}
    if network.masks:
        with tempfile.TemporaryDirectory(prefix="clicktrain-kernels-") as folder:
            result["plan_seconds"] = output_of_fresh_process(
                _MODULE, {**job, "what": "planning"}, {"CLICKTRAIN_KERNEL_CACHE": folder}, lean=False
            )
    result["memory_mb"] = output_of_fresh_process(_MODULE, {**job, "what": "memory"})
    return result


def _main(text: str) -> None:
    job = json.loads(text)
    torch.set_num_threads(job["threads"])
    config = RunConfig(**{**job["config"], "milestones": tuple(job["config"]["milestones"])})
    network = Network(job["key"], config, job["facts"], similar_masks(job["structure"]))
    precision, layout, *compiled = job["engine"].split()
    engine = Engine(precision, layout, bool(compiled))
    if job["what"] == "planning":
        print(_planning_seconds(network, engine))
        return
    # What is loaded and kept once, as modules and kernels, is there before memory is counted.
    steps = network.steps(engine)
    steps.step()
    steps.close()
    del steps
    gc.collect()
    print(peak_mb(lambda: network.steps(engine).step))


def _planning_seconds(network: Network, engine: Engine) -> float:
    """CPU seconds of this process and of compilers from the freeze on, until the second step begins."""
    before = _cpu_seconds()
    steps = network.steps(engine)
    planned = _cpu_seconds()
    steps.step()
    begin = _cpu_seconds()
    steps.step()
    return max(planned - before - 2 * (_cpu_seconds() - begin), 0.0)


def _cpu_seconds() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


if __name__ == "__main__":
    _main(sys.argv[1])
