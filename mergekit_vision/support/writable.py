"""Whether files can be written into a directory, looked at before any long work."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mergekit_vision.support.files import WORK
from mergekit_vision.support.paths import nearest


def place_fault(directory: Path, names: Iterable[str] = ()) -> str | None:
    """What keeps files of some names, and temporary ones, from being written into a directory, which need not be there yet.

    >>> place_fault(Path("/dev/null/x"))
    '/dev/null is a file; name a directory'
    """
    try:
        if fault := _fault_of_links(directory) or _fault_of_nearest(directory):
            return fault
        with suppress(FileNotFoundError):
            directory.lstat()  # says what is wrong with the name itself
        return next(iter(obstacles(directory, names)), None)
    except (OSError, ValueError) as error:
        return f"cannot be used ({getattr(error, 'strerror', None) or error}); name another directory"


def obstacles(directory: Path, names: Iterable[str]) -> list[str]:
    """What in a directory has the name of a file that is to be written there and is none, and what to do about it."""
    wrong = [f"{name} is a directory, and a file must go there" for name in names if (directory / name).is_dir()]
    if (directory / WORK).is_symlink() or (directory / WORK).is_file():
        wrong.append(f"{WORK} must be a directory, for temporary files")
    return [f"{fault}; remove it or name another directory" for fault in wrong]


def _fault_of_links(directory: Path) -> str | None:
    for place in (directory.absolute(), *directory.absolute().parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a link that leads nowhere; remove it or name another directory"
    return None


def _fault_of_nearest(directory: Path) -> str | None:
    """What is wrong with the directory, or else with the nearest one above it that is there."""
    place = nearest(directory)
    if not place.is_dir():
        return f"{place} is a file; name a directory"
    return None if os.access(place, os.W_OK) else f"{place} cannot be written to; name another directory"
