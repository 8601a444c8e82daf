"""Start a script as several processes of one training, for tests of any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_together(script: Path, processes: int, folder: Path, *words: str) -> Path:
    """Run ``python SCRIPT RANK PROCESSES FOLDER WORD...`` for each rank, to the end; the folder."""
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(processes), str(folder), *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return folder
