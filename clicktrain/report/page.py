"""The page: everything put together by templates, and written as one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from clicktrain import wording
from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.report import patterns
from clicktrain.report.channels import ChannelView, channel_view
from clicktrain.report.charts import Figure, Key
from clicktrain.report.comparison import (
    Entry,
    comparison_figures,
    differing_settings,
    entries,
    headline,
    headliner,
    stage_keys,
    time_factor,
)
from clicktrain.report.curves import run_figures
from clicktrain.report.layers import LayerRow, OutcomeRow, layer_rows, outcome_rows
from clicktrain.report.masks import MaskPicture, mask_pictures
from clicktrain.report.run_data import Run, number, read_runs
from clicktrain.report.timeline import Moment, timeline
from clicktrain.runs.summary import file_rows

if TYPE_CHECKING:
    from jinja2 import Template

MOST_OPEN = 2
"""With more pruned runs than this, the sections of all but the headline's run begin folded."""


def write_report(
    run_paths: Sequence[str | Path], output: str | Path, *, refresh_seconds: int | None = None
) -> Path:
    """Write one self-contained HTML page about one or several runs, finished or not; its folder is made.

    It reads the run folders only (YAML, JSON and safetensors; no code is executed) and depends on nothing but
    them: the same folders give the same bytes. The page needs no network and no script. Dense runs serve as
    baselines for runs of the same network and data.

    Args:
        run_paths: folders of the runs.
        output: the file.
        refresh_seconds: as long as a run is not finished, a browser loads the page again that often.

    Raises:
        UserError: a folder holds no run or a damaged file, or the output cannot be written.
    """
    target = Path(output)
    if target.is_dir():
        raise UserError(f"{target} is a folder: give the name of a file, as in {target / 'report.html'}")
    page = render(read_runs(run_paths), refresh_seconds)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(target, page)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    return target


def render(runs: Sequence[Run], refresh_seconds: int | None = None) -> str:
    """The page as text; see `write_report`."""
    compared = entries(runs)
    lead = headliner(compared)
    pruned = sum(not entry.run.is_dense for entry in compared)
    return template("report.html.j2").render(
        w=wording,
        refresh_seconds=None if all(run.finished for run in runs) else refresh_seconds,
        lead=lead,
        headline=headline(lead),
        context=_context(lead),
        tiles=_tiles(lead),
        rows=[_table_row(entry) for entry in compared],
        several=len(compared) > 1,
        figures=comparison_figures(compared) if len(compared) > 1 else [],
        settings=differing_settings([entry.run for entry in compared]),
        sections=[
            _section(entry, opened=pruned <= MOST_OPEN or entry is lead)
            for entry in sorted(compared, key=lambda entry: (entry is not lead, entry.run.is_dense))
        ],
        cell_text=patterns.cell_text,
        breakable=lambda name: Markup(".<wbr>").join(name.split(".")),  # after each dot of a module's path
    )


def template(name: str) -> Template:
    """One of the templates of this package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("clicktrain.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _context(entry: Entry) -> str:
    run = entry.run
    parts = [
        f"{run.method_name} on {run.config.get('model', 'a network')}",
        str(run.config.get("data", "")),
        f"{run.epochs_asked} epochs",
        f"seed {run.config.get('seed', wording.MISSING)}",
    ]
    return " · ".join(part for part in parts if part)


_TIME = {True: "wall clock, whole run", False: "so far, evaluation left out"}


@dataclass(frozen=True, slots=True)
class Tile:
    """A number worth a big font, what it is, and what it is to be compared with."""

    value: str
    name: str
    note: str


def _tiles(entry: Entry) -> list[Tile]:
    run, tiles = entry.run, []
    if run.accuracy is not None:
        note = "validation, top-1, last epoch"
        if entry.difference is not None:
            note = f"{wording.points(entry.difference)} points to dense"
        tiles.append(Tile(f"{wording.fixed(run.accuracy)}%", "accuracy", note))
    if not run.is_dense and run.compression is not None and run.finished:
        note = f"asked: {wording.times(run.compression_asked)}" if run.compression_asked else "all layers"
        tiles.append(Tile(wording.times(run.compression), "compression", note))
    if not run.is_dense and run.train_flops_ratio is not None:
        note = "of dense training of the same length" if run.finished else "of dense, so far"
        if number(run.summary, "initial_train_flops"):
            note = "of one dense training, initial weights included"
        nominal = wording.percent(run.train_flops_ratio_nominal)
        if nominal not in (wording.MISSING, wording.percent(run.train_flops_ratio)):
            note += f"; {nominal} if zeros cost nothing while masks move"
        tiles.append(Tile(wording.percent(run.train_flops_ratio), "training FLOPs", note))
    if not run.is_dense and run.inference_flops_ratio is not None:
        note = "of the dense network, per prediction"
        tiles.append(Tile(wording.percent(run.inference_flops_ratio), "inference FLOPs", note))
    packed, dense = _size(run, "packed.safetensors"), _size(run, "model.safetensors")
    if not run.is_dense and packed is not None and dense is not None:
        tiles.append(Tile(packed, "packed file", f"with zeros in place: {dense}"))
    if run.step_ms is not None:
        before, after = run.step_ms
        note = f"before: {before:.0f} ms, {before / after:.2f}× the time"  # noqa: RUF001
        tiles.append(Tile(f"{after:.0f} ms", "step after pruning", note))
    if run.total_seconds is not None:
        factor = time_factor(entry)
        note = f"{factor:.2f}× the dense run’s" if factor is not None else _TIME[run.finished]  # noqa: RUF001
        if number(run.summary, "initial_train_seconds"):
            note += ", initial weights included"
        tiles.append(Tile(wording.short_duration(run.total_seconds), "training time", note))
    return tiles


def _table_row(entry: Entry) -> Mapping[str, Any]:
    run = entry.run
    return {
        "entry": entry,
        "asked": None if run.is_dense else wording.times(run.compression_asked),
        "reached": wording.times(run.compression),
        "accuracy": wording.fixed(run.accuracy, 2),
        "best": wording.fixed(run.best_accuracy, 2),
        "difference": "baseline" if run.is_dense else wording.points(entry.difference),
        "train_flops": wording.percent(run.train_flops_ratio),
        "train_flops_nominal": wording.percent(run.train_flops_ratio_nominal),
        "inference_flops": wording.percent(run.inference_flops_ratio),
        "time": wording.duration(run.total_seconds),
        "data_share": wording.percent(run.data_share, 1),
        "hard_prune": wording.epoch(run.hard_prune_epoch),
        "seed": str(run.config.get("seed", wording.MISSING)),
        "device": run.device or wording.MISSING,
    }


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool and how its patterns were used."""

    pool: patterns.Pool
    uses: tuple[patterns.PatternUse, ...]
    total: patterns.PatternUse | None

    @property
    def highest(self) -> float:
        """The largest share of any pattern in any layer."""
        return max([0.01, *(share for use in self.uses for share in use.shares)])


@dataclass(frozen=True, slots=True)
class Section:
    """Everything the page shows of one run."""

    entry: Entry
    opened: bool
    headline: str
    outcome: tuple[OutcomeRow, ...]
    files: Sequence[Sequence[str]]
    figures: list[Figure]
    stages: tuple[Key, ...]
    channels: ChannelView | None
    moments: tuple[Moment, ...]
    pools: tuple[PoolView, ...]
    layers: tuple[LayerRow, ...]
    masks: tuple[MaskPicture, ...]
    epochs: tuple[tuple[str, ...], ...]
    facts: tuple[tuple[str, str], ...]


def _section(entry: Entry, *, opened: bool) -> Section:
    run = entry.run
    uses = [(pool, patterns.pattern_use(run, pool)) for pool in patterns.pools(run)]
    stages = stage_keys([entry])
    return Section(
        entry=entry,
        opened=opened,
        headline=headline(entry),
        outcome=outcome_rows((run.summary or {}).get("outcome")),
        files=file_rows(run.summary or {}),
        figures=run_figures(run),
        stages=stages if len(stages) > 1 else (),
        channels=channel_view(run),
        moments=timeline(run),
        pools=tuple(PoolView(pool, use, patterns.overall_use(use)) for pool, use in uses),
        layers=() if run.is_dense else layer_rows(run),
        masks=() if run.is_dense else mask_pictures(run),
        epochs=tuple(_epoch_line(line) for line in run.metrics),
        facts=_facts(run),
    )


def _epoch_line(line: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table of epochs."""
    density, rate = number(line, "density"), number(line, "learning_rate")
    return (
        wording.integer(number(line, "epoch")),
        str(line.get("stage", wording.MISSING)),
        wording.fixed(number(line, "train_loss"), 4),
        wording.fixed(number(line, "train_accuracy"), 2),
        wording.fixed(number(line, "val_loss"), 4),
        wording.fixed(number(line, "val_accuracy"), 2),
        wording.fixed(None if density is None else 100 * density, 2),
        wording.MISSING if rate is None else f"{rate:.3g}",
        wording.fixed(number(line, "seconds"), 2),
        wording.fixed(number(line, "data_seconds"), 2),
        wording.quantity(number(line, "train_flops")),
    )


def _facts(run: Run) -> tuple[tuple[str, str], ...]:
    """Machine, versions and sizes."""
    summary, facts = run.summary or {}, run.facts
    facts_shown = [
        ("device", summary.get("device")),
        ("CPU", summary.get("cpu")),
        ("GPU", summary.get("gpu")),
        ("images", wording.shape(facts.get("image_shape"))),
        ("classes", _classes(facts.get("classes"))),
        ("parameters", wording.integer(number(summary, "parameters"))),
        ("nonzero parameters", wording.integer(number(summary, "nonzero_parameters"))),
        ("FLOPs per prediction", wording.quantity(number(summary, "inference_flops"), "FLOPs")),
        ("training FLOPs", wording.quantity(number(summary, "train_flops"), "FLOPs")),
        ("training FLOPs, nominal", wording.quantity(number(summary, "train_flops_nominal"), "FLOPs")),
        ("step, median", _step_time(run)),
        ("model.safetensors", _size(run, "model.safetensors")),
        ("packed.safetensors", _size(run, "packed.safetensors")),
        *sorted((f"version of {name}", version) for name, version in (summary.get("versions") or {}).items()),
    ]
    return tuple((name, str(value)) for name, value in facts_shown if value and value != wording.MISSING)


def _classes(names: object) -> str | None:
    if not isinstance(names, list) or not names:
        return None
    shown = ", ".join(map(str, names[:12])) + (", …" if len(names) > 12 else "")
    return f"{len(names)}: {shown}"


def _size(run: Run, name: str) -> str | None:
    size = run.file_bytes(name)
    return None if size is None else wording.file_size(size)


def _step_time(run: Run) -> str | None:
    values = sorted(value for _, value in run.column("step_ms_median"))
    return f"{wording.quantity(values[len(values) // 2])} ms" if values else None
