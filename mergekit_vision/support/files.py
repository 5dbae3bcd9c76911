"""Files written whole or not at all, and the cache directory."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_vision.errors import InputError
from mergekit_vision.support.paths import expanded

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
