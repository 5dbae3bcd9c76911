"""Files written whole or not at all, and the cache directory."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_VARIABLE = "MERGEKIT_VISION_CACHE"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file beside its final place and rename it there when it is complete.

    Args:
        path: the file to write; missing parent directories are created.

    Yields:
        A temporary path in the same directory, with the suffix of ``path``. It is renamed over ``path`` when the block ends, and
        removed, leaving ``path`` as it was, when the block raises anything (a keyboard interrupt too).

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "results" / "table.json"
    >>> with replacing(target) as draft:
    ...     _ = draft.write_text("{}")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('{}', 1)
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.stem[:64]}.{uuid.uuid4().hex}{target.suffix}")
    try:
        draft.touch()
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)  # some writers make files that only their owner can read
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a directory beside its final place and rename it there when it is complete.

    Args:
        path: the directory to write; missing parents are created. All that it held is gone when the block ends.

    Yields:
        An empty directory beside ``path``. When the block raises anything, it is removed and ``path`` stays as it was.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name[:64]}.{uuid.uuid4().hex}")
    old = draft.with_suffix(".old")
    draft.mkdir()
    try:
        yield draft
        if target.exists():
            target.rename(old)
        draft.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for rest in (draft, old):
            shutil.rmtree(rest, ignore_errors=True)


def cache_dir() -> Path:
    """Directory of everything that can be computed again: ``$MERGEKIT_VISION_CACHE``, else the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("mergekit_vision")
