"""Content hashes."""

import errno
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.support.cache import Cache, json_form

_CHUNK = 1 << 20
_SIZE = 32  # bytes of a hash
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SETTLED_NS = 2_000_000_000  # a file written to within one tick of its time stamp may change again unnoticed


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Hash of a file's content (BLAKE2b, 64 hexadecimal digits), read in pieces.

    The hash is remembered in the cache directory by place, size and times, so a large checkpoint is read once.

    Raises:
        InputError: when ``path`` is not a readable file.
    """
    return _remembered("fingerprints", Path(path), lambda: hashlib.blake2b(digest_size=_SIZE))


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, as other programs compute it too; nothing is remembered."""
    return _digest_of(file, hashlib.sha256())


def remembered_sha256(path: Path) -> str:
    """The same, remembered as :func:`fingerprint` is: for files that a run reads anyway, not for those that it must verify."""
    return _remembered("sha256", path, hashlib.sha256)


def digest(*parts: object) -> str:
    """Hash of plain values (text, numbers, tuples of them) by their ``repr``: 64 hexadecimal digits."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=_SIZE).hexdigest()


def of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash of named tensors, in the order of their names: 64 hexadecimal digits.

    >>> import torch
    >>> from mergekit_vision.support.fingerprints import of_tensors
    >>> of_tensors({"a": torch.zeros(2)}) == of_tensors({"a": torch.zeros(2, 1)})
    False
    """
    content = hashlib.blake2b(digest_size=_SIZE)
    for name, value in sorted(tensors.items()):
        content.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        content.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def stamp(path: Path) -> tuple[str, int, int]:
    """Path, size and modification time (ns) of a file, for :func:`digest`: they change when the file does.

    Raises:
        InputError: when there is no such file, or its directory cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return str(path), status.st_size, status.st_mtime_ns


def stamps(directory: Path) -> list[tuple[str, int, int]]:
    """Stamps of all files below a directory, by their paths relative to it; none where there is no such directory.

    Links to nothing are left out, and so is what another process removes meanwhile.

    Raises:
        InputError: when a file cannot be looked at.
    """
    found = []
    for place, _, names in os.walk(directory, followlinks=True):
        for file in (Path(place, name) for name in names):
            try:
                status = file.stat()
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):
                    continue
                raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
            if stat.S_ISREG(status.st_mode):
                found.append((str(file.relative_to(directory)), status.st_size, status.st_mtime_ns))
    return sorted(found)


def _checked(value: Any) -> str:
    if not (isinstance(value, str) and _DIGEST.fullmatch(value)):
        raise ValueError("not a hash")
    return value


def _remembered(kind: str, path: Path, algorithm: "Callable[[], _Content]") -> str:
    """Hash of a file, remembered by its place, size, and the times of its last modification and change.

    Copying programs set the former to that of the original, which another file of the same size may share; none sets the latter.
    """
    try:
        file = path.resolve(strict=True)
        status = file.stat()
        settled = time.time_ns() - status.st_mtime_ns > _SETTLED_NS
        seen = os.fsencode(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns
        parts = [repr(seen)] if settled else None
        return Cache(kind, json_form(_checked)).recall(parts, lambda: _digest_of(file, algorithm()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


class _Content(Protocol):
    """What hashlib's objects have in common."""

    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def _digest_of(file: Path, content: _Content) -> str:
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()
