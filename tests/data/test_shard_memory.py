"""Memory does not grow with the number of images, and the middle of a long epoch is found at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import encode
from shard_files import write_groups, write_tar

SCRIPT = Path(__file__).parent / "shard_memory.py"


def write(kind: str, folder: Path, shards: int, per_shard: int, size: int) -> int:
    """Write shards of noise, of which 997 images take turns; returns their bytes."""
    draws = np.random.default_rng(0)
    images = [encode(draws.integers(0, 256, (size, size), dtype=np.uint8)) for _ in range(997)]
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        labels, own = [number % 10 for number in numbers], [images[number % 997] for number in numbers]
        if kind == "webdataset":
            write_tar(folder / f"train-{shard:04}.tar", labels, images=own)
        else:
            write_groups(folder / f"train-{shard:04}.parquet", labels, images=own, rows=500)
    return sum(path.stat().st_size for path in folder.iterdir())


def streamed(kind: str, folder: Path, processes: int, start: int) -> dict[str, Any]:
    words = [f"{kind}:{folder / 'set'}", str(folder / "cache"), str(processes), str(start)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("kind", "shards", "per_shard", "size"),
    [
        pytest.param("parquet-shards", 8, 1500, 96, marks=pytest.mark.long, id="parquet-shards-12,000"),
        pytest.param("parquet-shards", 100, 10_000, 8, marks=pytest.mark.slow, id="parquet-shards-1,000,000"),
        pytest.param("webdataset", 100, 10_000, 8, marks=pytest.mark.slow, id="webdataset-1,000,000"),
    ],
)
def test_memory_stays_and_an_epoch_goes_on_in_its_middle(
    kind: str, shards: int, per_shard: int, size: int, tmp_path: Path
) -> None:
    written = write(kind, tmp_path / "set", shards, per_shard, size)
    assert written > 64 * 2**20
    whole = streamed(kind, tmp_path, 1, 0)
    assert whole["images"] == shards * per_shard - 1000
    assert len(whole["digests"]) == whole["images"] // 200 == len(set(whole["digests"]))
    print(
        f"{written / 2**20:.0f} MiB of shards, {whole['opened'] / 2**20:.1f} MiB to open them, "
        f"{whole['growth'] / 2**20:.1f} MiB more at its end than at its beginning"
    )
    assert whole["opened"] < 256 * 2**20  # most of it libraries at their first use
    assert whole["growth"] < 16 * 2**20
    assert whole["spread"] < 96 * 2**20  # a batch that comes and goes
    start = len(whole["digests"]) * 3 // 4
    assert streamed(kind, tmp_path, 2, start)["digests"] == whole["digests"][start:]
