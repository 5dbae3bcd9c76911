"""Files written whole or not at all, and the cache directory."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_vision.errors import InputError
from mergekit_vision.support.locks import locked, remove_unused
from mergekit_vision.support.paths import expanded

CACHE_VARIABLE = "MERGEKIT_VISION_CACHE"

WORK = ".mergekit-vision"
"""Folder, beside the files that are being written, of all that is temporary."""

_DRAFT = re.compile(r"[0-9a-f]{32}")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file beside its final place and rename it there when it is complete.

    Args:
        path: the file to write; missing parent directories are created.

    Yields:
        A temporary path on the same file system, with the name of ``path``. It is renamed over ``path`` when the block ends, and
        removed, leaving ``path`` as it was, when the block raises anything (a keyboard interrupt too). What a process that was
        killed left is removed by the next that writes into the directory.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "results" / "table.json"
    >>> with replacing(target) as draft:
    ...     _ = draft.write_text("{}")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('{}', 1)
    """
    target = Path(path)
    with draft_folder(target.parent / WORK) as folder, _named(target, folder):
        draft = folder / target.name
        draft.touch()
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)  # some writers make files that only their owner can read
        draft.replace(target)


@contextmanager
def _named(target: Path, folder: Path) -> Iterator[None]:
    """Have errors name the file that cannot be written, and not its draft or, as of a full disk, none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or os.fspath(folder) in str(error.filename)):
            error.filename = os.fspath(target)
        raise


@contextmanager
def draft_folder(work: Path) -> Iterator[Path]:
    """A new folder for drafts in ``work``; neither is there afterwards."""
    folder = work / uuid.uuid4().hex
    with locked(folder, seconds=10):
        try:
            remove_abandoned(work)
            (folder / "draft").mkdir()
            yield folder / "draft"
        finally:
            remove_work(folder)


def move_into(source: Path, target: Path) -> None:
    """Move what is in a directory into another on the same file system, over older files; a directory new there goes at once."""
    for entry in sorted(source.iterdir()):
        there = target / entry.name
        if entry.is_dir() and there.is_dir():
            move_into(entry, there)
        else:
            entry.replace(there)


def remove_work(folder: Path) -> None:
    """Remove a folder for temporary files, and the one around it unless another process has something there."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def remove_abandoned(work: Path) -> None:
    """Remove drafts of processes that were killed."""
    for folder in work.iterdir():
        if _DRAFT.fullmatch(folder.name):
            remove_unused(folder)


def cache_dir() -> Path:
    """Directory of everything that can be computed again: ``$MERGEKIT_VISION_CACHE``, else the user's cache directory.

    Raises:
        InputError: when the variable holds what can be no path.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        try:
            return expanded(chosen)
        except InputError as error:
            raise InputError(f"{CACHE_VARIABLE}: {error}") from error
    import platformdirs

    return platformdirs.user_cache_path("mergekit_vision")
