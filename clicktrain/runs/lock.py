"""A lock on a run's folder, so that one process at a time trains in it.

The lock is an advisory ``flock`` on ``.lock`` in the run's folder. The kernel releases it however the process
ends, so that a run that was killed is never locked; the file's text (process and machine) only names the
holder. Network file systems: NFS from version 4 and most others pass ``flock`` on to the server; where one
refuses locks, the run says so and goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clicktrain.errors import UserError

fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
"""None on Windows: runs are not locked there."""

LOCK_NAME = ".lock"

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_HELD: set[int] = set()
"""Descriptors of the locks that this process holds."""


class RunFolderInUse(UserError):  # noqa: N818 - reads as a sentence to the user
    """Another process trains in the folder."""


@contextlib.contextmanager
def locked(folder: Path, message: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a run's folder, which exists; ``message`` is called if the file system has no locks.

    Raises:
        RunFolderInUse: another process (or another run of this one) holds it; names the process.
        OSError: the lock file cannot be made.
    """
    path = folder / LOCK_NAME
    descriptor = _acquire(path, message)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: whoever opened it before sees that it is gone, see `_acquire`
        _HELD.discard(descriptor)
        os.close(descriptor)


def holder(folder: Path) -> str | None:
    """The process that trains in a folder, as "process 12 on machine", or None."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        free = fcntl is None or _lock(descriptor, shared=True)
        return None if free else _name(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _acquire(path: Path, message: Callable[[str], None]) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _lock(descriptor):
                raise RunFolderInUse(
                    f"{path.parent} is in use: {_name(descriptor)} trains in it; wait until it has finished, "
                    "or stop it first"
                )
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            message(
                f"the file system of {path.parent} has no locks: see to it that one process at a time trains "
                "there"
            )
        except BaseException:
            os.close(descriptor)
            raise
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # its holder has removed it between our open and our lock
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _HELD.add(descriptor)
    return descriptor


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take the lock without waiting; False if another has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EACCES: how some file systems say the same
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _name(descriptor: int) -> str:
    with contextlib.suppress(OSError):
        text = os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip()
        if text.startswith("process "):
            return text
    return "another process"


def _close_in_child() -> None:
    """Release the locks in a fork: a loading process must not keep the lock of a parent that was killed."""
    for descriptor in _HELD:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
