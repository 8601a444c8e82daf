"""One of the processes whose exchange is timed; the first one prints a line of JSON for every row."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from clicktrain.bench.exchange.links import DEVICE, Link, slow_down, tool
from clicktrain.bench.exchange.networks import GROWS, Subject, make
from clicktrain.bench.exchange.token_bucket import TokenBucket
from clicktrain.bench.step import StepCase
from clicktrain.comm import Exchange, KeptExchange, counted
from clicktrain.comm.collectives import GRADIENTS, GROWTH, all_reduce_, carried_by
from clicktrain.comm.data_parallel import data_parallel
from clicktrain.kernels.native import keep_memory

_WAIT_S = 60
_STALLED_S = 300
"""Seconds after which a collective that does not come to its end has failed."""


@dataclass
class Sizes:
    """Carries all-reduces as they are, and notes what they were."""

    tensors: list[tuple[int, torch.dtype]] = field(default_factory=list)

    def __call__(self, tensor: torch.Tensor, op: Any, group: Any, async_op: bool) -> Any:
        """All-reduce a tensor, as `torch.distributed.all_reduce`."""
        self.tensors.append((tensor.numel(), tensor.dtype))
        return dist.all_reduce(tensor, op, group, async_op)


def main(job: dict[str, Any], rank: int) -> None:
    """Time every network over every link."""
    torch.set_num_threads(job["threads"])
    keep_memory()
    device = _own_device(rank) if job["wired"] else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = device
    store, number, timeout = f"file://{job['store']}", job["processes"], timedelta(seconds=_STALLED_S)
    dist.init_process_group("gloo", store, rank=rank, world_size=number, timeout=timeout)
    case = StepCase(job["model"], job["batch_size"], job["image_size"])
    for what in job["whats"]:
        subject = make(what, case, job["rounds"] + 1)
        step = _Step(subject, case, rank)
        if rank == 0:
            print(json.dumps({"progress": what}), flush=True)
        for text in job["links"]:
            link = Link.parse(text)
            with _over(link, device, job):
                rows = step.timed(job["rounds"])
            if rank == 0:
                how = "as it is" if link.gbit_s is None else ("tc" if job["wired"] else "token bucket")
                for row in rows:
                    print(json.dumps({**row, "link": link.name, "how": how}), flush=True)
        del step, subject
    dist.barrier()
    dist.destroy_process_group()


def _own_device(rank: int) -> str:
    """Set up the device that the hub has put into this process's namespace."""
    until = time.monotonic() + _WAIT_S
    while not os.path.exists(f"/sys/class/net/{DEVICE}") and not _has_device():
        if time.monotonic() > until:
            raise RuntimeError(f"no device {DEVICE} has come after {_WAIT_S} seconds")
        time.sleep(0.05)
    tool("ip", "link", "set", "lo", "up")
    tool("ip", "addr", "add", f"10.77.0.{rank + 1}/24", "dev", DEVICE)
    tool("ip", "link", "set", DEVICE, "up")
    return DEVICE


def _has_device() -> bool:
    """As ``ip`` sees it: /sys shows the namespace that it was mounted in."""
    with contextlib.suppress(RuntimeError):
        tool("ip", "link", "show", "dev", DEVICE)
        return True
    return False


@contextlib.contextmanager
def _over(link: Link, device: str, job: dict[str, Any]) -> Iterator[None]:
    """Exchange over a link inside the block."""
    if link.gbit_s is None:
        yield
    elif job["wired"]:
        slow_down(device, link)
        dist.barrier()
        yield
    else:
        bucket = TokenBucket(link.bytes_s, job["processes"])
        try:
            with carried_by(bucket):
                yield
        finally:
            bucket.close()


class _Step:
    """Training steps of one network, and what they exchange."""

    def __init__(self, subject: Subject, case: StepCase, rank: int) -> None:
        self.subject = subject
        self.x, self.y = StepCase(case.model, case.batch_size, case.image_size, case.seed).batch()
        self.x = self.x + 0.01 * rank  # gradients differ
        self.wrapper = data_parallel(subject.forward, KeptExchange(subject.masks))
        self.noted: dict[str, list[tuple[int, torch.dtype]]] = {}
        """What all-reduces of a step send, by kind."""
        for _ in range(2):  # buckets are made again after the first step, and kernels are built
            self.step()

    def step(self) -> None:
        """Forward, loss, backward with the exchange, and SGD."""
        loss = F.cross_entropy(self.wrapper(self.x), self.y)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.subject.pruner is not None:
            self.subject.pruner.observe(loss)
        self.subject.optimizer.step()
        self.subject.optimizer.zero_grad()

    def compute(self) -> None:
        """The same without exchange and without a change of weights."""
        with self.wrapper.no_sync():
            F.cross_entropy(self.wrapper(self.x), self.y).backward()  # type: ignore[no-untyped-call]
        self.subject.optimizer.zero_grad()

    def timed(self, rounds: int) -> list[dict[str, Any]]:
        """The rows of this network, one for usual steps, and one for those whose units grow if there are any.

        ``exchange_ms`` is of the same messages with nothing else going on.
        """
        kinds: dict[str, list[tuple[float, Exchange]]] = {}
        wanted = {"", GROWS} if self.subject.pruner is not None else {""}
        while not (wanted <= kinds.keys() and len(kinds[""]) >= rounds):
            sent: Exchange = {}
            dist.barrier()
            began = time.perf_counter()
            with counted(sent):
                self.step()
            kind = GROWS if GROWTH in sent else ""
            kinds.setdefault(kind, []).append((1e3 * (time.perf_counter() - began), sent))
        compute = _median_ms(self.compute, rounds)
        return [self._row(kind, [ms for ms, _ in steps], steps[-1][1], compute, rounds)
                for kind, steps in sorted(kinds.items())]  # fmt: skip

    def _row(
        self, kind: str, step_ms: list[float], sent: Exchange, compute: float, rounds: int
    ) -> dict[str, Any]:
        sizes = self._messages(kind)
        exchange = _median_ms(lambda: _exchange(sizes), rounds)
        size, calls = (sum(sent.get(key, [0, 0])[at] for key in (GRADIENTS, GROWTH)) for at in (0, 1))
        return {
            "what": self.subject.what + kind,
            "processes": dist.get_world_size(),
            "bytes_per_step": size,
            "calls_per_step": calls,
            "exchange_ms": exchange,
            "step_ms": statistics.median(step_ms),
            "step_ms_range": [min(step_ms), max(step_ms)],
            "compute_ms": compute,
        }

    def _messages(self, kind: str) -> list[tuple[int, torch.dtype]]:
        """What all-reduces of such a step send, noted in one that is carried by loopback or by the wire."""
        while kind not in self.noted:
            sizes = Sizes()
            sent: Exchange = {}
            with carried_by(sizes), counted(sent):
                self.step()
            self.noted[GROWS if GROWTH in sent else ""] = sizes.tensors
        return self.noted[kind]


def _exchange(sizes: list[tuple[int, torch.dtype]]) -> None:
    tensors = [torch.zeros(numel, dtype=dtype) for numel, dtype in sizes]
    work = [all_reduce_(tensor, GRADIENTS, async_op=True) for tensor in tensors]
    for one in work:
        one.get_future().wait()


def _median_ms(call: Callable[[], object], rounds: int) -> float:
    """Median milliseconds of a call that all processes begin together."""
    times = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)
