"""What this package has put into its cache directory, and how it is removed."""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mergekit_vision.support.files import cache_dir

KIND = "mergekit-vision cache 1"
"""How every file of :mod:`mergekit_vision.support.cache` begins."""

_VALUE, _BACKBONE = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


class Kept(NamedTuple):
    """What was computed and is kept in one folder of the cache directory.

    Attributes:
        folder: its name.
        places: files and directories in it, those of this package alone.
        size: of all of them, in bytes.
    """

    folder: str
    places: list[Path]
    size: int


def kept() -> list[Kept]:
    """What can be computed again. Neither data sets that were downloaded nor anything of others is among it."""
    root = cache_dir()
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink()) if root.is_dir() else []
    found = [(folder.name, [place for place in _listed(folder.iterdir()) if _is_ours(place)]) for folder in folders]
    return [Kept(name, places, sum(map(_size, places))) for name, places in found if places]


def clear_cache() -> Iterator[Kept]:
    """Remove it, folder by folder, with what was removed; runs that go on meanwhile compute it again."""
    for found in kept():
        for place in found.places:
            if place.is_dir():
                _remove(place)
            else:
                place.unlink(missing_ok=True)
        yield found


def _remove(directory: Path) -> None:
    while directory.is_dir():
        with suppress(FileNotFoundError):  # of a file that another process removes too; the others are still to be removed
            shutil.rmtree(directory)


def _is_ours(place: Path) -> bool:
    if place.is_symlink():
        return False
    if place.is_dir():
        return place.parent.name == "backbones" and bool(_BACKBONE.fullmatch(place.name))
    if not (place.is_file() and _VALUE.fullmatch(place.name)):
        return False
    try:
        with place.open("rb") as stream:
            return stream.read(len(KIND)) == KIND.encode()
    except FileNotFoundError:  # another process has removed it
        return False


def _size(place: Path) -> int:
    return sum(map(_length, _listed(place.rglob("*")) if place.is_dir() else [place]))


def _listed(places: Iterator[Path]) -> list[Path]:
    """Paths in order; those that were found before another process removed the directory."""
    found = []
    with suppress(FileNotFoundError):
        for place in places:
            found.append(place)
    return sorted(found)


def _length(file: Path) -> int:
    """Bytes of a file; 0 of what is none, or has just been removed."""
    try:
        return file.lstat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0
