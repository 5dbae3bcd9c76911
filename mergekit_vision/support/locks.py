"""Folders that one process at a time uses; the lock ends with its process, however that ends."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_vision.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PAUSE = 0.05  # seconds between two attempts


@contextmanager
def locked(folder: Path, seconds: float = 0.0) -> Iterator[None]:
    """Make a folder where it is missing, and hold its lock: a file in it, which goes when the folder is removed.

    Where the file system has no locks nobody learns of others, and everyone goes on.

    Args:
        folder: to hold; its parents are made too.
        seconds: how long to wait for another process.

    Raises:
        InputError: when another process holds it all that time.
    """
    deadline = time.monotonic() + seconds
    while (descriptor := _attempt(folder)) is None:
        if time.monotonic() > deadline:
            raise InputError(f"{folder.parent}: another process is writing here; run this again when that has ended")
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        _release(folder, descriptor)


def remove_unused(folder: Path) -> None:
    """Remove a folder that is locked while it is used, unless it is; where there are no locks that is unknown, and it stays."""
    with suppress(OSError):
        descriptor = _open(folder)
        try:
            if _lock(descriptor) and _there(folder, descriptor):
                shutil.rmtree(folder, ignore_errors=True)  # under the lock: who has just made the folder may be about to take it
        finally:
            _release(folder, descriptor)


def _attempt(folder: Path) -> int | None:
    """A descriptor that holds the lock, or would where there are locks; ``None`` when another process does."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        descriptor = _open(folder)
    except (FileNotFoundError, FileExistsError):  # whoever held it has just removed it, perhaps while `mkdir` looked at it
        if any(os.path.lexists(place) and not place.is_dir() for place in (folder, *folder.parents)):
            raise
        return None
    with suppress(OSError):  # no locks here
        if not _lock(descriptor) or not _there(folder, descriptor):
            os.close(descriptor)
            return None
    return descriptor


def _release(folder: Path, descriptor: int) -> None:
    """Give a lock up, and remove its folder if it is empty: on NFS a file removed while it is open keeps it until then."""
    os.close(descriptor)
    with suppress(OSError):  # removed already; or not empty, as where the lock is still there, or another process has one
        folder.rmdir()
        folder.parent.rmdir()


def _open(folder: Path) -> int:
    return os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)


def _lock(descriptor: int) -> bool:
    """Whether a file could be locked.

    Raises:
        OSError: when there are no locks.
    """
    if fcntl is None:
        raise OSError("no locks")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _there(folder: Path, descriptor: int) -> bool:
    """Whether what was locked has not been removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), (folder / "lock").stat())
    except FileNotFoundError:
        return False
