"""Values kept on disk by what they depend on, so that they are computed once."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.support.cache_contents import KIND
from mergekit_vision.support.console import logger
from mergekit_vision.support.files import cache_dir, replacing
from mergekit_vision.support.json_files import to_json
from mergekit_vision.support.paths import is_file
from mergekit_vision.support.team import ALONE, Team
from mergekit_vision.version import __version__

Value = TypeVar("Value")

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError)


@dataclass(frozen=True)
class Form(Generic[Value]):
    """How a value lies in a file.

    Attributes:
        encode: value -> content.
        decode: content -> value; a ``ValueError``, ``KeyError`` or ``TypeError`` says that it is no such value.
    """

    encode: Callable[[Value], bytes]
    decode: Callable[[bytes], Value]


def json_form(check: Callable[[Any], Value]) -> Form[Value]:
    """Plain values as JSON; ``check`` turns what was parsed into the value, or raises for anything else."""
    return Form(lambda value: to_json(value, in_order=True).encode(), lambda content: check(json.loads(content)))


def tensor_form(check: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Form[Tensor]:
    """One tensor, on the CPU; ``check`` raises for a tensor that cannot be the value."""
    return Form(
        lambda tensor: safetensors.torch.save({"value": tensor.contiguous()}),
        lambda content: check(safetensors.torch.load(content)["value"]),
    )


class Cache(Generic[Value]):
    """Values in one folder of the cache directory.

    A file begins with a digest of its name and content. One that cannot be read, was changed, or holds something else counts as
    absent. A value that cannot be written is not kept, with one warning: nothing else depends on the cache.

    Args:
        folder: its name in the cache directory.
        form: how the values are stored.
        team: the processes that compute a value together; all take the first one's, which alone reads and writes.
    """

    def __init__(self, folder: str, form: Form[Value], team: Team = ALONE) -> None:
        self._folder, self._form, self._team = folder, form, team

    def recall(self, parts: Iterable[str] | None, compute: Callable[[], Value]) -> Value:
        """The value for some conditions: from the cache, or computed, as it will be when it is read again.

        Args:
            parts: everything the value depends on; ``None`` where that cannot be told: then nothing is kept.
            compute: finds the value, on all processes together.
        """
        path = None if parts is None else self._path(parts)
        known = self._team.broadcast(self._read(path) if self._team.rank == 0 else None, 0)
        if known is None:
            known = self._team.broadcast(self._form.encode(compute()), 0)
            if path is not None and self._team.rank == 0:
                _keep(path, _head(path, known) + known)
        return self._form.decode(known)

    def _path(self, parts: Iterable[str]) -> Path:
        key = hashlib.blake2b("\n".join([__version__, *parts]).encode(), digest_size=20).hexdigest()
        return cache_dir() / self._folder / key

    def _read(self, path: Path | None) -> bytes | None:
        """What a file keeps, if it is a value."""
        if path is None or not is_file(path):  # reading from a pipe could wait forever
            return None
        try:
            head, _, content = path.read_bytes().partition(b"\n")
            if head + b"\n" != _head(path, content):
                return None
            self._form.decode(content)
        except _UNREADABLE:
            return None
        return content


def _head(path: Path, content: bytes) -> bytes:
    """The first line of a file: what it is, and the digest of its name and content."""
    digest = hashlib.blake2b(path.name.encode() + b"\n" + content, digest_size=20).hexdigest()
    return f"{KIND} {digest}\n".encode()


def _keep(path: Path, content: bytes) -> None:
    try:
        with replacing(path) as draft:
            draft.write_bytes(content)
    except (OSError, InputError) as error:  # the latter where another process holds a lock for long
        _warn_once(str(cache_dir()), str(getattr(error, "strerror", None) or error))


def _warn_once(directory: str, reason: str) -> None:
    if directory not in _warned:
        _warned.add(directory)
        logger.warning("%s: cannot be written to (%s); results are not remembered", directory, reason)


_warned: set[str] = set()
"""Cache directories of which it was said that nothing can be written there."""
