"""The cache of the Hugging Face hub's library: where a repository lies in it, and whether its files are whole."""

import hashlib
import os
import re
import stat
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

_PARTIAL = ".incomplete"
_SHA256, _GIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")
_CHUNK = 1 << 20
_SILENCE = 600.0  # seconds after which a file that is not complete is nobody's any more


def repository_folder(repository: str, kind: str = "model") -> Path:
    """Where the library keeps a repository, a ``model`` or a ``dataset``, on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"


def remove_damaged(folder: Path) -> list[Path]:
    """Remove the files of a repository whose content is not what the hub has, so that they are downloaded again.

    Of what processes that were killed left, newer versions of the library make no use, and it is removed too after a while.

    The library names each file by the hub's hash of it: the SHA-256 of a large one, git's SHA-1 of any other. Where the system
    has no symbolic links it does not, and nothing can be told.
    """
    damaged, late = [], time.time() - _SILENCE
    for file, status in _blobs(folder).items():
        whole = _is_whole(file, status.st_size, status.st_mtime_ns)
        if not whole:
            damaged.append(file)
        if not whole or (file.suffix == _PARTIAL and status.st_mtime < late):
            _remove(file, status)
    return damaged


def _remove(file: Path, seen: os.stat_result) -> None:
    """Remove a file, unless another process has put a new one in its place since it was looked at."""
    with suppress(FileNotFoundError):
        now = file.stat()
        if (now.st_ino, now.st_mtime_ns) == (seen.st_ino, seen.st_mtime_ns):
            file.unlink()


def whole_bytes(folder: Path) -> int:
    """Size of the files of a repository that are here and complete."""
    return sum(status.st_size for file, status in _blobs(folder).items() if file.suffix != _PARTIAL)


def _blobs(folder: Path) -> dict[Path, os.stat_result]:
    """The files of a repository by where they lie, without those that another process renames or removes meanwhile."""
    found = {}
    for file in (folder / "blobs").glob("*"):
        with suppress(FileNotFoundError):
            found[file] = file.stat()
    return {file: status for file, status in found.items() if stat.S_ISREG(status.st_mode)}


@cache  # a repository may have the experts of many tasks, and is looked at for each
def _is_whole(file: Path, size: int, _: int) -> bool:
    """Whether a file has the hash that is its name; what has another name, such as one that is incomplete, is left alone."""
    if _SHA256.fullmatch(file.name):
        content = hashlib.sha256()
    elif _GIT.fullmatch(file.name):
        content = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        return True
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                content.update(chunk)
    except FileNotFoundError:  # another process has found it damaged
        return False
    return content.hexdigest() == file.name
