"""``python -m clicktrain``: the same as the command ``clicktrain``."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Python puts the current folder first in the path of `python -m`: a folder of somebody else's could hold
    # a yaml.py. The package finds its own modules without it; --model puts it back to find what it names.
    if not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]

    from clicktrain.cli import script

    script()
