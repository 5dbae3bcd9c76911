"""Files written whole or not at all, the cache directory, and content hashes."""

import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_vision.errors import InputError

CACHE_VARIABLE = "MERGEKIT_VISION_CACHE"

_CHUNK = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SETTLED_NS = 2_000_000_000  # a file written to within one tick of its time stamp may change again unnoticed


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
        yield draft
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o666 & ~mask)  # some writers make files that only their owner can read
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Directory of everything that can be computed again: ``$MERGEKIT_VISION_CACHE``, else the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("mergekit_vision")


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash of a file's content (BLAKE2b, 64 hexadecimal digits), read in pieces.

    The hash is remembered in the cache directory by place, size and modification time, so a large checkpoint is read once. A
    memo that cannot be read or written costs another read and is no error.

    Raises:
        InputError: when ``path`` is not a readable file.
    """
    try:
        file = Path(path).resolve(strict=True)
        status = file.stat()
        identity = f"{file}|{status.st_size}|{status.st_mtime_ns}"
        memo = cache_dir() / "fingerprints" / hashlib.blake2b(os.fsencode(identity), digest_size=16).hexdigest()
        known = _read_memo(memo)
        if known is not None:
            return known
        found = _hash(file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
        with suppress(OSError), replacing(memo) as draft:
            draft.write_text(found, encoding="ascii")
    return found


def digest(*parts: object) -> str:
    """Hash of plain values (text, numbers, tuples of them) by their ``repr``: 64 hexadecimal digits."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).hexdigest()


def stamp(path: Path) -> tuple[str, int, int]:
    """Path, size and modification time (ns) of a file, for :func:`digest`: they change when the file does."""
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def stamps(directory: Path) -> list[tuple[str, int, int]]:
    """Stamps of all files below a directory, by their paths relative to it; none where there is no such directory."""
    files = (Path(place, name) for place, _, names in os.walk(directory, followlinks=True) for name in names)
    return sorted((str(file.relative_to(directory)), *stamp(file)[1:]) for file in files if file.is_file())


def _read_memo(memo: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        text = memo.read_text(encoding="ascii")
        return text if _DIGEST.fullmatch(text) else None
    return None


def _hash(file: Path) -> str:
    content = hashlib.blake2b(digest_size=32)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()
