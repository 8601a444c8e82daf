"""Starts a worker: ``python -m clicktrain.bench.exchange.start JSON RANK``.

It asks to end with the hub before it imports anything that takes time.
"""

from __future__ import annotations

import json
import sys

from clicktrain.bench.exchange.children import end_with_parent

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    end_with_parent(job["parent"])
    from clicktrain.bench.exchange.worker import main
    from clicktrain.comm.processes import end

    main(job, int(sys.argv[2]))
    end(0)
