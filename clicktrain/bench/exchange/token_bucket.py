"""A slow link that is only a wait: tokens come at its rate, and an all-reduce needs as many as it sends.

For machines that permit no virtual network. Latency, and what a real link does when it is full, are missing.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BURST_S = 0.001
"""Seconds of tokens that the bucket holds at the most."""


class TokenBucket:
    """Carries all-reduces one after another, in a thread of its own: a backward pass goes on meanwhile.

    Args:
        bytes_s: the link's rate, of each direction.
        processes: a ring all-reduce among them sends every byte 2 (P - 1) / P times.
    """

    def __init__(self, bytes_s: float, processes: int) -> None:
        self.bytes_s, self.share = bytes_s, 2 * (processes - 1) / processes
        self._group = dist.new_group()  # in its order, whatever the caller's thread sends in between
        self._jobs: queue.SimpleQueue[tuple[Tensor, Any, torch.futures.Future[list[Tensor]]] | None] = (
            queue.SimpleQueue()
        )
        self._free_at = 0.0
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def __call__(self, tensor: Tensor, op: Any, group: Any, async_op: bool) -> Any:
        """All-reduce a tensor over all processes, in place, as `torch.distributed.all_reduce`."""
        del group
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self._jobs.put((tensor, op, future))
        if not async_op:
            future.wait()
            return None
        return _Work(future)

    def close(self) -> None:
        """End the thread, after what was handed to it."""
        self._jobs.put(None)
        self._thread.join()

    def _carry(self) -> None:
        while (job := self._jobs.get()) is not None:
            tensor, op, future = job
            try:
                self._wait(tensor.nbytes * self.share)
                dist.all_reduce(tensor, op, self._group)
            except Exception as error:
                future.set_exception(error)  # type: ignore[arg-type]
            else:
                future.set_result([tensor])

    def _wait(self, size: float) -> None:
        """Wait for the tokens; those that came while nothing was sent fill the bucket up to its burst."""
        now = time.perf_counter()
        self._free_at = max(self._free_at, now - BURST_S) + size / self.bytes_s
        time.sleep(max(self._free_at - now, 0.0))


class _Work:
    """What an asynchronous all-reduce returns, as far as hooks ask for it."""

    def __init__(self, future: torch.futures.Future[list[Tensor]]) -> None:
        self._future = future

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        return self._future
