"""The ``Callback`` class of whichever Lightning there is: ``lightning.pytorch`` or ``pytorch_lightning``.

They are two packages with the same code, and each knows its own class only. Where both are installed, a
program has usually imported the one it uses before, which then counts.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _callbacks() -> tuple[Any, ...]:
    """The classes to derive from: of what is imported already, else of the first that can be."""
    found = [sys.modules[name] for name in _NAMES if name in sys.modules]
    for name in _NAMES if not found else ():
        try:
            found = [importlib.import_module(name)]
            break
        except ImportError:
            continue
    if not found:
        raise ImportError("Lightning is not installed: pip install 'clicktrain[lightning]'")
    return tuple(dict.fromkeys(module.Callback for module in found))


Callback: Any = type("Callback", _callbacks(), {"__doc__": "What Lightning calls at each moment of a run."})
