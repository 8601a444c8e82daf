"""Links between processes: loopback, and virtual Ethernet slowed down by the kernel's token bucket filter.

Each process is given a network namespace of its own that has no name: it ends with the process, and with it
the virtual Ethernet pair. Nothing of the machine's own network is touched, and nothing is left behind,
however the benchmark ends.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from dataclasses import dataclass

from clicktrain.errors import UserError

LOOPBACK = "loopback"
DEVICE = "eth0"
"""Name of the virtual Ethernet device in a process's own network namespace."""
_UNSHARE = (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"])
"""As root, or as a user who may make user namespaces."""
_TRIAL = (
    "ip link add hub type bridge && ip link add probe0 type veth peer name probe1 && "
    "tc qdisc add dev probe0 root tbf rate 100mbit burst 64kb latency 50ms"
)


@dataclass(frozen=True, slots=True)
class Link:
    """A link by its rate in Gbit/s of each direction; None: the loopback as it is."""

    gbit_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read ``loopback`` or a number of Gbit/s; UserError otherwise."""
        if text == LOOPBACK:
            return cls()
        try:
            rate = float(text)
        except ValueError:
            rate = 0.0
        if not 0.001 <= rate <= 100:
            raise UserError(f"a link is {LOOPBACK} or a rate from 0.001 to 100 Gbit/s, not {text!r}")
        return cls(rate)

    @property
    def name(self) -> str:
        """As it stands in tables."""
        return LOOPBACK if self.gbit_s is None else f"{self.gbit_s:g} Gbit/s"

    @property
    def bytes_s(self) -> float:
        """Bytes per second."""
        return 1e9 / 8 * (self.gbit_s or 0.0)


def unshare_command() -> list[str] | None:
    """How to start a process in a network namespace of its own here; None where that is not permitted."""
    if any(shutil.which(tool) is None for tool in ("unshare", "ip", "tc")):
        return None
    for command in _UNSHARE:
        trial = [*command, "sh", "-c", _TRIAL]
        try:
            done = subprocess.run(trial, capture_output=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return list(command)
    return None


def tool(*words: str) -> None:
    """Run ``ip`` or ``tc``; RuntimeError with what it says if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")


def slow_down(device: str, link: Link) -> None:
    """Let a device send no faster than the link; replaces what was set before."""
    # A bucket of 4 ms, the kernel's timer at its slowest, and of one large packet at least.
    burst = max(round(link.bytes_s * 0.004), 1 << 16)
    rate = f"{round(link.bytes_s * 8)}bit"
    # Not `replace`, which keeps what waits: a packet larger than the new bucket would wait for ever.
    with contextlib.suppress(RuntimeError):  # nothing was set
        tool("tc", "qdisc", "del", "dev", device, "root")
    tool("tc", "qdisc", "add", "dev", device, "root", "tbf",
         "rate", rate, "burst", f"{burst}b", "latency", "100ms")  # fmt: skip
