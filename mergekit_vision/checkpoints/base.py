"""What the checkpoint formats share: open_clip names and lazy, per-process reading."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

PREFIXES = ("visual.", "model.visual.")


class CheckpointWeights(Mapping[str, Tensor], ABC):
    """Weights of one vision tower in one file.

    Keys are ``visual.…`` whatever prefix the file uses (``visual.``, ``model.visual.``, or none when no key has either); keys of
    the text tower are left out. A tensor is read at access, comes in the file's dtype, and may be a view of the mapped file: do
    not change it in place. Objects can be pickled and used after a fork; the file is opened again in each process.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: Any = None
        self._owner = -1
        shapes = self._read_shapes()
        self._names = visual_names(shapes)
        self._shapes = {key: shapes[name] for key, name in self._names.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape, from the file's header alone."""
        return dict(self._shapes)

    @abstractmethod
    def _open(self) -> Any:
        """Open the file; what is returned is kept for this process."""

    @abstractmethod
    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> shape, without reading a tensor."""

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """Read one tensor by its name in the file."""

    def _opened(self) -> Any:
        if self._handle is None or self._owner != os.getpid():
            self._handle, self._owner = self._open(), os.getpid()
        return self._handle

    def __getitem__(self, key: str) -> Tensor:
        return self._read(self._names[key])

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} tensors)"


def visual_names(names: Iterable[str]) -> dict[str, str]:
    """Map open_clip's key of each vision weight to its name in a file.

    >>> visual_names(["model.visual.proj", "model.text_projection"])
    {'visual.proj': 'model.visual.proj'}
    >>> visual_names(["proj"])
    {'visual.proj': 'proj'}
    """
    names = list(names)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return {f"visual.{name[len(prefix) :]}": name for name in names if name.startswith(prefix)}
    return {f"visual.{name}": name for name in names}
