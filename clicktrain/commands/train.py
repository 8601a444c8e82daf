"""``clicktrain train``: settings from flags and a recipe, then a run or a dry run."""

from __future__ import annotations

import itertools
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clicktrain.accounting import training_memory
from clicktrain.accounting.memory import bytes_in_words
from clicktrain.comm.processes import launched
from clicktrain.commands.arguments import QUIET, REPORT, Command, Option, options_of
from clicktrain.commands.processes import PROCESSES, check, start, without
from clicktrain.commands.progress import carry_out
from clicktrain.errors import UserError
from clicktrain.methods import METHODS, Method
from clicktrain.own_code import is_own
from clicktrain.runs.format import is_settings_of_run
from clicktrain.settings import field_names, to_plain
from clicktrain.train import Prepared, RunConfig, RunFolder, from_dict, load_config
from clicktrain.train.checkpoint import bytes_needed
from clicktrain.train.config import check_said_once, code_settings, read_settings
from clicktrain.train.device import autocast
from clicktrain.train.prepare import prepare
from clicktrain.train.recipe_lines import recipe_lines
from clicktrain.train.time_budget import plan_time
from clicktrain.wording import clock, short

_OWN: dict[str, tuple[Option, ...]] = {
    "run": (
        Option("config", str | None, "YAML file with settings; flags given beside it win.", metavar="FILE"),
        Option("dry_run", bool, "Check everything, print the plan and the cost, write no run.", False),
        Option(
            "resume",
            bool,
            "Go on with the run in --out if it has begun, as a job does that is started again with the same "
            "command.",
            False,
            main=False,
        ),
        *PROCESSES,
    ),
    "output": (
        Option(
            "out",
            str | None,
            "Folder of the run, new or empty (or of a run killed before its first checkpoint); dated by "
            "default.",
            metavar="DIR",
        ),
        REPORT,
        QUIET,
    ),
}
"""Flags that are no settings of a run, by heading."""

GROUPS: dict[str, tuple[str, str, str]] = {
    "run": (
        "epochs device precision",
        "time_budget seed threads deterministic compile cuda_graphs",
        "budget_epochs exchange exchange_dtype",
    ),
    "data": (
        "data",
        "augment image_size val_fraction holdout workers cutout mixup cutmix auto_augment erasing "
        "augment_repeats",
        "shuffle_buffer cache_dir mix_probability randaugment_operations randaugment_magnitude "
        "randaugment_deviation randaugment_probability erasing_fill",
    ),
    "model": (
        "model width",
        "stem initial_weights whitening sync_batch_norm channels_last packed",
        "parts operators",
    ),
    "recipe": (
        "batch_size optimizer learning_rate schedule",
        "weight_decay momentum nesterov warmup_epochs layer_decay loss milestones gamma second_cycle distill "
        "teacher label_smoothing ema_decay clip_grad_norm accumulate dynamic_batch",
        "decay_norm_and_bias bias_rate_factor layer_rates bce_threshold cycle_floor distill_temperature "
        "learning_rate_batch learning_rate_scaling lookahead recalibrate_norms memory_budget "
        "batch_granularity batch_limit batch_lr",
    ),
    "method": ("method", "", ""),
    "output": (
        "log",
        "evaluate_every test_time_augmentation checkpoint_every keep_checkpoints",
        "tensorboard",
    ),
}
"""Settings of a run by heading: those that ``--help`` explains, those that it only names, and rarely used
ones, which are left to ``--help-all``."""

_EXAMPLES = (
    "clicktrain train --data digits --compression 8 --epochs 12 --out runs/first",
    "clicktrain train --config recipes/digits.yaml --method pat --prune-ratio 0.3 --dry-run",
    "clicktrain train --method pat --help",
)
_FOOTER = (
    "'clicktrain train --method NAME --help' explains the settings of a method, '--help-all' every flag. "
    "A flag without a value turns a switch on, --no-FLAG turns it off."
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    config, method, own, ignored = settings_of(argv)
    check(own["processes"], own["restarts"], own["process_timeout"])
    if own["dry_run"]:
        return dry_run(config, method)
    out = own["out"]
    folder = RunFolder.default(config.model, config.method) if out is None else RunFolder(Path(out))
    if out is None and (own["resume"] or launched().may_restart):
        raise UserError("a run that may have to be found again needs a name: give --out")
    if own["processes"] > 1:
        there = [] if out is not None else ["--out", str(folder.path)]
        return start("train", [*without(argv), *there], own["processes"], own["restarts"])
    left_out = f"method {config.method} has no {', '.join(ignored)}: those of the recipe are left out"
    notes = [left_out] if ignored else []
    return carry_out(
        config,
        method,
        folder,
        quiet=own["quiet"],
        report=own["report"],
        notes=notes,
        resume="if begun" if own["resume"] else "if restarted",
        process_timeout=own["process_timeout"],
    )


def settings_of(argv: Sequence[str]) -> tuple[RunConfig, Method[Any], dict[str, Any], list[str]]:
    """What a command line asks for: settings, method, the command's own flags, and what the method ignores.

    Raises:
        UserError: a flag or a value that does not exist or does not fit, a recipe that is none.
    """
    recipe = _peek(argv, "config")
    settings = {} if recipe is None else read_recipe(recipe, argv)
    name = _peek(argv, "method") or settings.get("method", RunConfig.method)
    alone = bool({"-h", "--help"} & set(argv)) and _peek(argv, "method") is not None
    given = command_of(name, alone and "--help-all" not in argv).parse(argv)
    own = {option.name: given.pop(option.name, option.default) for group in _OWN.values() for option in group}
    check_said_once({"method": name, **given})
    values, ignored = merge(settings, given)
    return *from_dict(values), own, ignored


def merge(recipe: dict[str, Any], flags: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings of a recipe with those of the command line on top; and which were left out, if not at default.

    If the flags name another method, what that method does not have is left out of the recipe (so that the
    dense baseline of a recipe is ``--method dense``). If they name another preset, settings that merely
    spell out the recipe's own preset, as the saved config of a run does, are left out too. Of settings that
    say the same thing, as a sparsity and a compression, a flag replaces all of the recipe's.
    """
    old = recipe.get("method", RunConfig.method)
    new = flags.get("method", old)
    kept, ignored = dict(recipe), []
    if new != old and new in METHODS:
        valid = {*field_names(RunConfig), *field_names(METHODS[new])}
        defaults = to_plain(METHODS[old]())
        for key in set(kept) - valid:
            if kept.pop(key) != defaults.get(key):
                ignored.append(key)
    for group in METHODS[new].alternatives + RunConfig.alternatives if new in METHODS else ():
        if any(flags.get(name) is not None for name in group):
            kept = {key: value for key, value in kept.items() if key not in group}
    other_preset = flags.get("preset", recipe.get("preset")) != recipe.get("preset")
    if other_preset and new == old and "preset" in recipe:
        implied = to_plain(METHODS[old](preset=recipe["preset"]))
        kept = {key: value for key, value in kept.items() if key not in implied or implied[key] != value}
    return {**kept, **flags}, sorted(ignored)


def read_recipe(path: str, argv: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a YAML file, as they stand there; UserError unless they are a valid recipe.

    Code of the user's own that the file names has to be named in ``argv`` too, see `load_config`.
    """
    values = read_settings(path)
    if not is_settings_of_run(path):  # which spell out all of them
        check_said_once(values, path)
    given = {name: _peek(argv, name) for name in code_settings(values) if is_own(values.get(name))}
    own = {name: value for name, value in given.items() if value is not None}
    load_config(path, own.pop("model", None), own)
    return values


_ASKED = (
    "compression",
    "sparsity",
    "target_flops",
    "target_parameters",
    "prune_ratio",
    "n",
    "m",
    "criterion",
)
"""Settings of a method that say what a run is asked for: always explained."""


def command_of(method: str, alone: bool = False) -> Command:
    """The command with the settings of a method; ``alone``: only these are explained."""
    if method not in METHODS:
        raise UserError(f"method is {method!r}: use one of {', '.join(METHODS)}")
    chosen = METHODS[method]
    title = f"settings of method {method}"
    wide = max(map(len, METHODS)) + 2
    own = {title: [replace(one, main=alone or one.name in _ASKED, named=False) for one in options_of(chosen)]}
    return Command(
        name="train",
        description="Train and prune in one run. A YAML recipe (--config) holds the settings of the run; "
        "flags win.",
        groups=own if alone else _groups(own),
        notes={
            "method": [f"{key:<{wide}}{_summary(cls)}" for key, cls in METHODS.items()],
            title: [" ".join((chosen.__doc__ or "").split())] if alone else [],
        },
        explain=lambda name: _of_another_method(name, method),
        examples=(example_of(method),) if alone else _EXAMPLES,
        footer=_FOOTER,
        more={title: f"clicktrain train --method {method} --help"},
    )


def commands() -> Sequence[Command]:
    """The command with the settings of each method, the default's first; for completion."""
    return [command_of(name) for name in sorted(METHODS, key=lambda name: name != RunConfig.method)]


def example_of(method: str) -> str:
    """A command line that trains with a method on data that is there."""
    asked = {
        "n": "2 --m 4",
        "compression": "8",
        "sparsity": "0.8",
        "target_flops": "0.6",
        "prune_ratio": "0.3",
    }
    names = [name for name in asked if name in field_names(METHODS[method])]
    said = f" --{names[0].replace('_', '-')} {asked[names[0]]}" if names else ""
    start = " --initial-weights runs/dense" if METHODS[method]().expects_trained else ""
    return f"clicktrain train --method {method}{said}{start} --data digits --epochs 24 --out runs/{method}"


def _groups(own: Mapping[str, Sequence[Option]]) -> dict[str, Sequence[Option]]:
    """All flags by heading, with the settings of a method below the list of methods."""
    options = {option.name: option for option in options_of(RunConfig)}
    options["method"] = replace(options["method"], metavar="NAME")
    groups: dict[str, Sequence[Option]] = {}
    for head, (main, named, rare) in GROUPS.items():
        settings = [
            replace(options[name], main=name in main.split(), named=name not in rare.split())
            for name in f"{main} {named} {rare}".split()
        ]
        groups[head] = [*_OWN.get(head, ()), *settings]
        if head == "method":
            groups.update(own)
    return groups


def _summary(cls: type) -> str:
    """The first sentence of a method's documentation, in one line."""
    sentence = " ".join((cls.__doc__ or "").split()).partition(". ")[0].rstrip(".")
    return textwrap.shorten(sentence, 74, placeholder=" ...")


def _of_another_method(name: str, method: str) -> str | None:
    having = [other for other, cls in METHODS.items() if other != method and name in field_names(cls)]
    if not having:
        return None
    instead = f" or use --method {' or '.join(having)}" if len(having) < 3 else ""
    return (
        f"--{name.replace('_', '-')} is a setting of method {', '.join(having)}, not of {method}: "
        f"leave it out{instead}"
    )


def _peek(argv: Sequence[str], name: str) -> str | None:
    """Read the last value of a text flag before parsing: which flags exist depends on it."""
    value = None
    for token, following in itertools.zip_longest(argv, argv[1:]):
        if token == (flag := f"--{name.replace('_', '-')}"):
            value = following
        elif token.startswith(f"{flag}="):
            value = token.partition("=")[2]
    return value


_WARM_UP, _TIMED = 1, 4
"""Training steps before and during the measurement."""


def dry_run(config: RunConfig, method: Method[Any]) -> int:
    """Check everything, print the plan and the estimated cost; the exit code."""
    if config.time_budget is not None:
        config, _ = plan_time(config, method, print)
    prepared = prepare(config, method)
    print(prepared.pruner.plan(), "", *cost_lines(prepared), sep="\n")
    return 0


def cost_lines(prepared: Prepared) -> list[str]:
    """Model, data, FLOPs, time and disk of the run; time as measured on a few steps of dense training."""
    config, cost = prepared.config, prepared.cost.initial
    batches = len(prepared.train_loader)
    images = config.epochs * batches * config.batch_size
    ms = step_ms(prepared)
    example = torch.zeros(1, *prepared.data.image_shape, device=prepared.device)
    precision = partial(autocast, prepared.device, config.precision)
    memory = training_memory(prepared.model, example, prepared.optimizer, autocast=precision)
    return [
        f"model: {config.model}, {cost.parameters:,} parameters, "
        f"{short(cost.forward_flops_dense, ' ')}FLOPs forward per image",
        f"data: {prepared.data.describe()}",
        f"training: {config.epochs} epochs x {batches} batches of {config.batch_size}, "
        f"{short(cost.training_flops_dense * images, ' ')}FLOPs if it stayed dense",
        *recipe_lines(prepared),
        f"time: about {clock(config.epochs * batches * ms / 1000)} at {ms:.0f} ms per dense batch on "
        f"{prepared.device} (measured), without evaluation",
        f"memory: about {bytes_in_words(memory.at_batch(config.batch_size))} per iteration (estimated)",
        f"disk: up to {bytes_needed(prepared.model, config) / 2**20:,.0f} MB",
        "dry run: nothing was written",
    ]


def step_ms(prepared: Prepared) -> float:
    """Median milliseconds of a forward and backward pass with its data, over a few batches."""
    prepared.model.train()
    times: list[float] = []
    batches = iter(prepared.train_loader.epoch(0))
    started = time.perf_counter()
    for x, y in itertools.islice(batches, _WARM_UP + _TIMED):
        with autocast(prepared.device, prepared.config.precision):
            loss = F.cross_entropy(prepared.model(x).float(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # waits for the device
        now = time.perf_counter()
        times.append(1000 * (now - started))
        started = now
    return statistics.median(times[_WARM_UP:] or times)
