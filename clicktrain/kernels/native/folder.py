"""Where libraries are kept: which folder, what killed processes left in it, and how large it may get.

``$CLICKTRAIN_KERNEL_CACHE``, else ``clicktrain/kernels`` in the user's cache. One that cannot be used is
replaced by a temporary folder of this process. Whatever is being built stands in a folder of its own, which
its process holds a lock on: locks end with their processes, so what nobody holds is a leftover.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from clicktrain.files import cache_folder as user_cache
from clicktrain.kernels.native.failure import KernelError

_TEMPORARY = "clicktrain-kernels-"
_BUILD = "build-"
_KEPT = re.compile(r"[0-9a-f]{32}(\.\d+\.[0-9a-f]{32})?\.so|[0-9a-f]{32}\.c|plan-[0-9a-f]{32}\.json")
KEEP_DAYS = 90
"""Days after which unused libraries, sources and plans are removed."""
KEEP_BYTES = 1 << 30
"""Bytes that the cache may fill; beyond it the least recently used files are removed."""
_DAY = 86400.0
_YOUNG_SECONDS = 60.0
"""A folder may stand for a moment before its lock is taken."""
_LEAST_SPACE = 1 << 20
"""Free bytes below which a compiler that failed did so for want of space."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HELP = "set CLICKTRAIN_KERNEL_CACHE to a folder of your own, on a disk with space that may run programs"
_notice: list[str] = []
"""Until `take_notice` takes it."""


def take_notice() -> str:
    """Why kernels are kept in a temporary folder, with what would help; empty where they are not.

    Once per process: empty from the second call on.
    """
    return _notice.pop() if _notice else ""


@contextlib.contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A folder for what is being built; removed at the end, or by another process if this one is killed."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=_BUILD, dir=parent))
    except OSError as error:
        raise unwritable(parent, error) from error
    lock = _hold(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def unwritable(folder: Path, error: OSError | None = None) -> KernelError:
    """For a folder of libraries in which nothing can be written any more; without an error, it is full."""
    error = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    help_ = "free some space, or set" if error.errno in _FULL else "set"
    return KernelError(
        f"the kernel cache {folder} cannot be written ({error.strerror or error}): {help_} "
        "CLICKTRAIN_KERNEL_CACHE to another folder"
    )


def is_full(folder: Path, output: str) -> bool:
    """Whether a program that printed this failed for want of space in a folder."""
    said = [*map(os.strerror, _FULL), signal.strsignal(signal.SIGXFSZ) or ""]
    if any(text and text in output for text in said):
        return True
    try:
        facts = os.statvfs(folder)
    except OSError:
        return False
    return facts.f_bavail * facts.f_frsize < _LEAST_SPACE


def mark_used(path: Path) -> None:
    """Note that a library or a plan is in use, once a day."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY:
            os.utime(path)


@functools.cache
def tidy(folder: Path) -> None:
    """Remove what killed processes left, and what has not been used for long; once per process."""
    remove_abandoned(folder)
    remove_unused(folder)


def remove_abandoned(folder: Path) -> None:
    """Remove build folders and temporary files of killed processes here, and their temporary caches."""
    for path in _entries(folder):
        if path.name.startswith(_BUILD) and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".") and path.suffix == ".tmp":
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > _DAY:
                    path.unlink()
    with contextlib.suppress(OSError):
        for path in _entries(Path(tempfile.gettempdir())):
            if path.name.startswith(_TEMPORARY) and _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def remove_unused(folder: Path, days: float = KEEP_DAYS, most: int = KEEP_BYTES) -> None:
    """Remove libraries and plans that have not been used for some days, and the oldest beyond a size.

    Processes that have loaded a library keep it; the others build it again.
    """
    files = []
    for path in _entries(folder):
        if _KEPT.fullmatch(path.name):
            with contextlib.suppress(OSError):
                facts = path.lstat()
                files.append((facts.st_mtime, facts.st_size, path))
    total = sum(size for _, size, _ in files)
    for used, size, path in sorted(files):
        if time.time() - used <= days * _DAY and total <= most:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size


# ---------------------------------------------------------------- which folder


@functools.cache
def cache_folder() -> Path:
    """The folder of libraries, made for its owner only, since they are executed; KernelError without any."""
    wanted = user_cache("kernels", "CLICKTRAIN_KERNEL_CACHE")
    why = "has no place without a home folder" if wanted is None else why_unusable(wanted)
    if wanted is not None and not why:
        return wanted
    name = f"the kernel cache {wanted}" if wanted is not None else "the kernel cache"
    try:
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
    except OSError as error:
        also = f"there is no temporary folder either ({error.strerror})"
    else:
        also = why_unusable(folder)
        if not also:
            _keep_while_running(folder)
            _notice.append(f"{name} {why}, so kernels are rebuilt by each process: {_HELP}")
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        also = f"the temporary folder {folder.parent} {also}"
    raise KernelError(f"{name} {why}, and {also}: {_HELP}")


def why_unusable(folder: Path) -> str:
    """Why libraries cannot be kept and run in a folder, as a predicate; empty if they can. Makes it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if facts.st_uid != os.geteuid():
            return "belongs to another user"
        if facts.st_mode & 0o022:
            return "can be written to by others"
        if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
            return "is on a file system that runs no programs (noexec)"
        with tempfile.NamedTemporaryFile(prefix=".try-", suffix=".tmp", dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        return f"cannot be written ({getattr(error, 'strerror', None) or error})"
    return ""


# ---------------------------------------------------------------- locks


def _keep_while_running(folder: Path) -> None:
    """Hold a temporary cache until this process ends, then remove it."""
    owner, lock = os.getpid(), _hold(folder)

    def remove() -> None:
        if os.getpid() == owner:  # a forked process may end earlier
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)

    atexit.register(remove)


def _hold(folder: Path) -> int | None:
    """Lock a folder: the descriptor that holds the lock, or None where there are no locks."""
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder is ours and no process holds it; where there are no locks, whether it is a day old."""
    import fcntl

    try:
        facts = folder.lstat()
        age = time.time() - facts.st_mtime
        if facts.st_uid != os.geteuid() or not folder.is_dir() or folder.is_symlink() or age < _YOUNG_SECONDS:
            return False
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return age > _DAY
    finally:
        os.close(descriptor)
    return True


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries]
    except OSError:
        return []
