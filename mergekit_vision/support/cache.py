"""Values kept on disk by what they depend on, so that they are computed once."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from mergekit_vision.support.console import logger
from mergekit_vision.support.files import cache_dir, replacing
from mergekit_vision.support.json_files import to_json
from mergekit_vision.support.team import ALONE, Team
from mergekit_vision.version import __version__

Value = TypeVar("Value")

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError)


@dataclass(frozen=True)
class Form(Generic[Value]):
    """How a value lies in a file.

    Attributes:
        suffix: of the file.
        encode: value -> content.
        decode: content -> value; a ``ValueError``, ``KeyError`` or ``TypeError`` says that it is no such value.
    """

    suffix: str
    encode: Callable[[Value], bytes]
    decode: Callable[[bytes], Value]


def json_form(check: Callable[[Any], Value]) -> Form[Value]:
    """Plain values as JSON; ``check`` turns what was parsed into the value, or raises for anything else."""
    return Form(".json", lambda value: to_json(value, in_order=True).encode(), lambda content: check(json.loads(content)))


TENSOR: Form[Tensor] = Form(
    ".safetensors",
    lambda tensor: safetensors.torch.save({"value": tensor.contiguous()}),
    lambda content: safetensors.torch.load(content)["value"],
)
"""One tensor, on the CPU."""


class Cache(Generic[Value]):
    """Values in one folder of the cache directory.

    A file that cannot be read, or holds something else, counts as absent. A value that cannot be written is not kept, with one
    warning: nothing else depends on the cache.

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
                _keep(path, known)
        return self._form.decode(known)

    def _path(self, parts: Iterable[str]) -> Path:
        key = hashlib.blake2b("\n".join([__version__, *parts]).encode(), digest_size=20).hexdigest()
        return cache_dir() / self._folder / f"{key}{self._form.suffix}"

    def _read(self, path: Path | None) -> bytes | None:
        """A file's content, if it is a value."""
        try:
            content = path.read_bytes() if path is not None else None
            if content is not None:
                self._form.decode(content)
        except _UNREADABLE:
            return None
        return content


def _keep(path: Path, content: bytes) -> None:
    try:
        with replacing(path) as draft:
            draft.write_bytes(content)
    except OSError as error:
        _warn_once(str(cache_dir()), str(error.strerror or error))


@cache
def _warn_once(directory: str, reason: str) -> None:
    logger.warning("%s: cannot be written to (%s); results are not remembered", directory, reason)
