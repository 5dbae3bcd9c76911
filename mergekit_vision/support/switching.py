"""Several files of a directory replaced by others in one step.

The step is one rename. Before it, each of the files becomes a symbolic link to itself by way of ``current``, a link to the folder
of the old files; then ``current`` is made a link to the folder of the new ones; then each new file replaces its link. A reader
finds under the files' names the old set before the rename and the new one after it, wherever a process is killed.
"""

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_vision.support.files import WORK, remove_abandoned, remove_work
from mergekit_vision.support.locks import locked

_WORK = Path(WORK, "set")
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without symbolic links answer


@contextmanager
def replacing_set(directory: Path, former: Callable[[], Collection[str]], deciding: str) -> Iterator[Path]:
    """Write files into an empty folder, and put all of them into a directory in one step when they are complete.

    Other files of the directory stay as they are. One process at a time does this; another waits.

    Args:
        directory: made when missing.
        former: names of the files to replace; those that are not written anew are gone after the same step.
        deciding: one of the files. Where the file system has no symbolic links, files are renamed one by one: this one is
            removed first and comes last, so that a directory without it is not complete.

    Yields:
        The folder. When the block raises anything, the directory is left as it was.

    Raises:
        InputError: when another process does not end.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp())
    >>> for names in (["a", "b"], ["b", "c"]):
    ...     with replacing_set(place, lambda: ["a", "b", "c"], deciding="b") as folder:
    ...         for name in names:
    ...             _ = (folder / name).write_text(name)
    >>> sorted(path.name for path in place.iterdir())
    ['b', 'c']
    """
    work = directory / _WORK
    with locked(work, seconds=60):
        remove_abandoned(work.parent)
        _settle(directory)
        (work / "new").mkdir()
        try:
            yield work / "new"
            _switch(directory, former(), deciding)
        finally:
            _settle(directory)
            remove_work(work)


def unsettled(directory: Path) -> bool:
    """Whether a replacement is going on in a directory, or was cut off."""
    return (directory / _WORK).is_dir()


def _switch(directory: Path, former: Collection[str], deciding: str) -> None:
    """Make the new files those that are found, by one rename."""
    work = directory / _WORK
    try:
        (work / "current").symlink_to("old")
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LINKS:
            raise
        _rename_singly(directory, former, deciding)
        return
    names = [name for name in former if (directory / name).is_file()]
    (work / "old").mkdir()
    for name in names:
        _keep(directory / name, work / "old" / name)
    for name in sorted({*names, *_names(work / "new")}):
        (work / "link").symlink_to(_WORK / "current" / name)
        (work / "link").replace(directory / name)
    (work / "link").symlink_to("new")
    (work / "link").replace(work / "current")


def _settle(directory: Path) -> None:
    """Put the files that ``current`` leads to in the place of the links to them, and remove all others."""
    work = directory / _WORK
    current = work / "current"
    if current.is_symlink():
        chosen = work / ("new" if current.readlink() == Path("new") else "old")
        for name in _names(chosen) if chosen.is_dir() else ():
            (chosen / name).replace(directory / name)
        for entry in directory.iterdir():
            if entry.is_symlink() and entry.readlink().parent == _WORK / "current":  # leads nowhere anymore
                entry.unlink()
        current.unlink()
    (work / "link").unlink(missing_ok=True)
    for folder in (work / "old", work / "new"):
        shutil.rmtree(folder, ignore_errors=True)


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def _keep(file: Path, place: Path) -> None:
    """Have a file at a second place too, by a copy only where it must be."""
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copy2(file, place)


def _rename_singly(directory: Path, former: Collection[str], deciding: str) -> None:
    new = directory / _WORK / "new"
    written = sorted(_names(new), key=lambda name: name == deciding)
    for name in (deciding, *(name for name in former if name not in written)):
        (directory / name).unlink(missing_ok=True)
    for name in written:
        (new / name).replace(directory / name)
