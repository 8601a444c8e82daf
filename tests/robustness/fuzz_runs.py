"""Run folders from somebody else: values, files and kinds of files that a run does not leave."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from cases import DATA, TINY, Case, Expected
from wrong_values import JSON, damaged, mutated

from clicktrain.cli import main

TEXTS = ("config.yaml", "summary.json", "metrics.jsonl", "events.jsonl", "surgery.json", "operators.json")
FILES = (*TEXTS, "model.safetensors", "packed.safetensors")
READERS: tuple[tuple[str, ...], ...] = (
    ("inspect", "run"), ("inspect", "run", "--json"), ("evaluate", "run"), ("evaluate", "run", "--json"),
    ("report", "run"), ("export", "run", "--format", "safetensors"), ("export", "run", "--format", "torch"),
    ("resume", "run", "--no-report"), ("report", "run", "-o", "page.html"),
    ("train", *TINY, "--method", "dense", "--epochs", "1", "--no-report", "--initial-weights", "run",
    "--out", "new"),
)  # fmt: skip
EVIL = "open('code_was_run', 'w').close()\ndef build(num_classes, in_channels):\n    raise SystemExit(3)\n"


@functools.cache
def finished_runs() -> Path:
    """Finished runs of three kinds, trained once a process: weights or channels removed, and dense."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-runs-"))
    kinds = {"masks": ("--compression", "4"), "dense": ("--method", "dense"),
             "channels": ("--method", "campfire", "--sparsity", "0.5")}  # fmt: skip
    for name, flags in kinds.items():
        line = ["train", *TINY, "--epochs", "4", *flags, "--no-report", "--quiet", "--out", str(root / name)]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(line) == 0, name
    return root


def forget_runs() -> None:
    """Remove the finished runs."""
    if finished_runs.cache_info().currsize:
        shutil.rmtree(finished_runs(), ignore_errors=True)
        finished_runs.cache_clear()


def cases(rng: random.Random, count: int) -> list[Case]:
    """``count`` folders, each read by one command."""
    makers: tuple[tuple[float, Callable[[random.Random], Case]], ...] = (
        (0.25, _wrong_summary), (0.22, _wrong_facts), (0.12, _wrong_config), (0.13, _damaged_file),
        (0.08, _wrong_lines), (0.06, _no_regular_file), (0.08, _foreign_factory), (0.06, _wrong_checkpoint),
    )  # fmt: skip
    weights = [weight for weight, _ in makers]
    return [rng.choices(makers, weights)[0][1](rng) for _ in range(count)]


def _case(
    rng: random.Random,
    what: str,
    change: Callable[[Path], None],
    reader: tuple[str, ...] | None = None,
    expected: Expected = "either",
) -> Case:
    kind = rng.choice(("masks", "dense", "channels"))
    line = list(reader or rng.choice(READERS))

    def act(place: Path) -> list[str]:
        shutil.copytree(finished_runs() / kind, place / "run")
        change(place / "run")
        return line

    return Case("run folders", f"{line[0]} {kind}: {what}", act, expected)


def _wrong_summary(rng: random.Random) -> Case:
    seed = rng.random()

    def change(run: Path) -> None:
        values = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(mutated(values, random.Random(seed))))

    return _case(rng, "a wrong value in summary.json", change)


def _wrong_facts(rng: random.Random) -> Case:
    seed, file = rng.random(), rng.choice(("model.safetensors", "packed.safetensors"))

    def change(run: Path) -> None:
        own = random.Random(seed)
        header, data = _split(run / file)
        metadata = header["__metadata__"]
        choice = own.random()
        if choice < 0.15:
            metadata = {k: str(v) for k, v in mutated(metadata, own).items()}
        elif choice < 0.75:
            key = own.choice(sorted(metadata))
            with contextlib.suppress(ValueError):
                metadata[key] = json.dumps(mutated(json.loads(metadata[key]), own))
        else:
            name = own.choice([name for name in header if name != "__metadata__"])
            header[name] = mutated(header[name], own)
        header["__metadata__"] = metadata
        _join(run / file, header, data)

    return _case(rng, f"a wrong value in the header of {file}", change)


def _wrong_config(rng: random.Random) -> Case:
    seed = rng.random()

    def change(run: Path) -> None:
        own = random.Random(seed)
        path = run / "config.yaml"
        first, _, rest = path.read_text().partition("\n")
        if own.random() < 0.3:
            version = own.choice(("x", "99", "-1", "", "9" * 5000, "1.5", "\U0001f642"))
            path.write_text(f"# clicktrain run folder, format {version}\n{rest}")
        else:
            values = mutated(yaml.safe_load(rest), own)
            path.write_text(f"{first}\n{yaml.safe_dump(values)}")

    return _case(rng, "a wrong value in config.yaml", change)


def _damaged_file(rng: random.Random) -> Case:
    seed, name = rng.random(), rng.choice(FILES)

    def change(run: Path) -> None:
        if (run / name).exists():
            (run / name).write_bytes(damaged((run / name).read_bytes(), random.Random(seed)))

    return _case(rng, f"{name} damaged", change)


def _wrong_lines(rng: random.Random) -> Case:
    seed, name = rng.random(), rng.choice(("metrics.jsonl", "events.jsonl", "surgery.json", "operators.json"))

    def change(run: Path) -> None:
        own, path = random.Random(seed), run / name
        if not path.exists() or not path.read_text():
            path.write_text(json.dumps(own.choice(JSON)) + "\n")
            return
        text = path.read_text()
        lines = text.splitlines() if name.endswith("l") else [text]
        at = own.randrange(len(lines))
        value = mutated(json.loads(lines[at]), own)
        lines[at] = own.choice((json.dumps(value), "[" * 5000, "1" * 5000, "{", "null", "NaN"))
        path.write_text("\n".join(lines) + "\n")

    return _case(rng, f"a wrong line in {name}", change)


def _no_regular_file(rng: random.Random) -> Case:
    name, kind = rng.choice((*FILES, "channels.jsonl", "robustness.json")), rng.randrange(5)

    def change(run: Path) -> None:
        path = run / name
        path.unlink(missing_ok=True)
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            path.mkdir()
        else:
            path.symlink_to(("/dev/zero", name, "nowhere")[kind - 2])

    return _case(rng, f"{name} is no regular file", change)


def _foreign_factory(rng: random.Random) -> Case:
    both = rng.random() < 0.7

    def change(run: Path) -> None:
        (run.parent / "fuzzed_evil.py").write_text(EVIL)
        (run.parent / "yaml.py").write_text(EVIL)
        header, data = _split(run / "model.safetensors")
        facts = json.loads(header["__metadata__"]["clicktrain"])
        header["__metadata__"]["clicktrain"] = json.dumps({**facts, "model": "fuzzed_evil:build"})
        _join(run / "model.safetensors", header, data)
        if both:
            text = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(text.replace("model: resnet8", "model: fuzzed_evil:build"))

    readers = [r for r in READERS if r[0] in ("inspect", "evaluate", "export")]
    return _case(rng, "a factory that nobody named", change, rng.choice(readers), "refused")


def _wrong_checkpoint(rng: random.Random) -> Case:
    seed = rng.random()

    def change(run: Path) -> None:
        own = random.Random(seed)
        (run / "summary.json").unlink()
        for path in (run / "checkpoints").iterdir():
            choice = own.random()
            if choice < 0.4:
                path.write_bytes(damaged(path.read_bytes(), own))
            elif choice < 0.8:
                header, data = _split(path)
                header["__metadata__"] = {k: str(v) for k, v in mutated(header["__metadata__"], own).items()}
                _join(path, header, data)
            else:
                path.unlink()
                os.mkfifo(path)

    return _case(rng, "checkpoints damaged", change, ("resume", "run", "--no-report", "--quiet"))


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


assert DATA in TINY
