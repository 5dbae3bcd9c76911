"""What all kinds of checkpoint files share: named tensors that are read one at a time."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mergekit_vision.errors import InputError

LONGEST_NAME = 1000
"""Characters that the name of a tensor may have."""


class TensorInfo(NamedTuple):
    """What is known of a stored tensor before it is read.

    Attributes:
        shape: of the tensor.
        dtype: its name in PyTorch, such as ``"float32"``.
    """

    shape: tuple[int, ...]
    dtype: str


class Container(ABC):
    """Named tensors in a file, or in several that belong together.

    A tensor is read at access, comes in its stored dtype, and may be a view of the mapped file: do not change it in place.
    Objects can be pickled and used after a fork; the file is opened again in each process.

    Attributes:
        path: the file.
        kind: of the file, in words.
        entries: name in the file -> what is known of the tensor.
        values: name in the file -> other plain values stored there: text, numbers, lists of them.
    """

    kind: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        self._owner = -1
        self.values: Mapping[str, Any] = {}
        self.entries: Mapping[str, TensorInfo] = self._read_entries()
        if any(len(name) > LONGEST_NAME for name in self.entries):
            raise InputError(f"{path}: has names of more than {LONGEST_NAME} characters, which no model has")

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return (self.path,)

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor by its name in the file."""

    @abstractmethod
    def _read_entries(self) -> dict[str, TensorInfo]:
        """Name -> what is known of the tensor, without reading it."""

    @abstractmethod
    def _open(self) -> Any:
        """Open the file; what is returned is kept for this process."""

    def _opened(self) -> Any:
        if self._handle is None or self._owner != os.getpid():
            self._handle, self._owner = self._open(), os.getpid()
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"


def damaged(path: Path, kind: str, error: Exception) -> InputError:
    """The error for a file that cannot be read as what it seems to be."""
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return InputError(f"{path}: truncated, damaged, or not a {kind} ({reason}); copy or download it again")
