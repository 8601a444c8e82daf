"""Run an example in processes that torchrun has started, or alone, and write what each ends with.

python launched.py EXAMPLE EPOCHS FOLDER: EXAMPLE.py has ``main(epochs)``, which returns the network.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
warnings.simplefilter("ignore")  # those of the launchers
torch.set_num_threads(1)
network = importlib.import_module(sys.argv[1]).main(int(sys.argv[2]))
torch.save(network.state_dict(), Path(sys.argv[3]) / f"{os.environ.get('RANK', '0')}.pt")
