"""Paths and files as anyone may name them: looked at without waiting, and without errors of the file system."""

import os
import stat
from pathlib import Path

from mergekit_vision.errors import InputError


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` and ``~user`` replaced by the home directory.

    Raises:
        InputError: when there is no such user, or the text can be no path.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise InputError(f"{text!r:.60}: holds a NUL character, which no path does")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{Path(text).parts[0]}: no home directory of such a user is known; write the path out") from error


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file that can be looked at; ``False`` too for what can be no path, where :mod:`pathlib` may raise."""
    return os.path.isfile(path)  # noqa: PTH113


def is_directory(path: str | os.PathLike[str]) -> bool:
    """Whether there is a directory, likewise."""
    return os.path.isdir(path)  # noqa: PTH112


def nearest(path: Path) -> Path:
    """The path itself or the nearest directory above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def read_text(path: Path, limit: int) -> str:
    """A whole file of UTF-8 text, without a byte order mark.

    Args:
        path: the file. Reading from a pipe or a device could wait forever.
        limit: largest size in bytes.

    Raises:
        InputError: when there is no such regular file, it is larger, cannot be read or is not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: {'a directory' if stat.S_ISDIR(status.st_mode) else 'a pipe or device'}, not a file")
        if status.st_size > limit:
            raise InputError(f"{path}: of {status.st_size} bytes, where {limit} are the limit; is it the right file?")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); is it the right file?") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
