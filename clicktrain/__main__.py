"""``python -m clicktrain``: the same as the command ``clicktrain``."""

from __future__ import annotations

import sys

from clicktrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
