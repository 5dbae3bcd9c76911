"""Several files of a directory replaced by others in one step.

The step is one rename. Before it, each of the files becomes a symbolic link to itself by way of ``current``, a link to the folder
of the old files; then ``current`` is made a link to the folder of the new ones; then each new file replaces its link. A reader
finds under the files' names the old set before the rename and the new one after it, wherever a process is killed.
"""

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_vision.support.files import WORK, remove_abandoned, remove_work
from mergekit_vision.support.locks import locked

PATIENCE = 60.0
"""Seconds to wait for another process that writes into the same directory."""
_WORK = Path(WORK, "set")
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without symbolic links answer


@contextmanager
def replacing_set(
    directory: Path, former: Callable[[], Collection[str]], deciding: str, seconds: float = PATIENCE
) -> Iterator[Path]:
    """Write files into an empty folder, and put all of them into a directory in one step when they are complete.

    Other files of the directory stay as they are. One process at a time does this; another waits.

    Args:
        directory: made when missing, and then removed again when the block raises anything.
        former: paths, from the directory, of the files to replace; those that are not written anew are gone after the same step.
        deciding: one of the files. Where the file system has no symbolic links, files are renamed one by one: this one is
            removed first and comes last, so that a directory without it is not complete.
        seconds: how long to wait for another process.

    Yields:
        The folder. When the block raises anything, the directory is left as it was; a folder left empty replaces nothing.

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
    new, work = not directory.exists(), directory / _WORK
    try:
        with _settling(directory, seconds):
            (work / "new").mkdir()
            yield work / "new"
            if any((work / "new").iterdir()):
                _switch(directory, former(), deciding)
    except BaseException:
        if new:
            with suppress(OSError):
                directory.rmdir()
        raise


@contextmanager
def _settling(directory: Path, seconds: float = PATIENCE) -> Iterator[None]:
    """Hold a directory; what a killed process left there is put in order before, and all that is temporary removed after."""
    work = directory / _WORK
    with locked(work, seconds):
        try:
            remove_abandoned(work.parent)
            _settle(directory)
            yield
        finally:
            _settle(directory)
            remove_work(work)


def settle(directory: Path) -> None:
    """Put in order what a killed process left in a directory: the old files are there or the new ones, and nothing else.

    Raises:
        InputError: when another process is writing there and does not end.
    """
    if unsettled(directory):
        with _settling(directory):
            pass


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
        _keep(directory / name, _placed(work / "old" / name))
    for name in sorted({*names, *_names(work / "new")}):
        (work / "link").symlink_to(_way(name))
        (work / "link").replace(_placed(directory / name))
    (work / "link").symlink_to("new")
    (work / "link").replace(work / "current")


def _settle(directory: Path) -> None:
    """Put the files that ``current`` leads to in the place of the links to them, and remove all others."""
    work = directory / _WORK
    current, old, new = work / "current", work / "old", work / "new"
    if current.is_symlink():
        chosen, other = (new, old) if current.readlink() == Path("new") else (old, new)
        for name in _names(chosen):
            if _stays_inside(directory, name):
                (chosen / name).replace(_placed(directory / name))
        for name in _names(other):
            _remove_link(directory, name)
        current.unlink()
    (work / "link").unlink(missing_ok=True)
    for folder in (old, new):
        shutil.rmtree(folder, ignore_errors=True)


def _remove_link(directory: Path, name: str) -> None:
    """Remove a link that leads nowhere anymore, and the folders in which it was alone."""
    path = directory / name
    if path.is_symlink() and path.readlink() == _way(name):
        path.unlink()
        with suppress(OSError):
            for folder in list(Path(name).parents)[:-1]:
                (directory / folder).rmdir()


def _stays_inside(directory: Path, name: str) -> bool:
    """Whether a path stays in the directory, in which anybody may have put links."""
    return not any((directory / folder).is_symlink() for folder in list(Path(name).parents)[:-1])


def _names(folder: Path) -> list[str]:
    """Paths of all files below a folder, from there; none below a link."""
    if folder.is_symlink():
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()]


def _way(name: str) -> Path:
    """Where the link under a name leads."""
    return Path(*[".."] * (len(Path(name).parts) - 1), _WORK, "current", name)


def _placed(path: Path) -> Path:
    """The same path, whose folder is there."""
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
    return path


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
        (new / name).replace(_placed(directory / name))
