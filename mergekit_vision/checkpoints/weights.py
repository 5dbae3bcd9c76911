"""Experts as checkpoints give them: whole towers, parts of towers, or changes to a backbone."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_vision.checkpoints.container import Container
from mergekit_vision.checkpoints.places import Place
from mergekit_vision.errors import InputError
from mergekit_vision.support.fingerprints import digest, fingerprint

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that weights may be stored in."""

Weights = Mapping[str, Tensor]
"""open_clip's key, ``visual.…`` -> tensor."""

Parts = Mapping[str, list[tuple[Place, str]]]
"""Key -> the place and the name in the file of each stored tensor that it is made of."""


class Expert(ABC):
    """A fine-tuned vision tower as a checkpoint holds it. Objects can be pickled and used after a fork.

    Args:
        container: of the tensors.
        origin: what was read and how, for the record of a merge.

    Attributes:
        path: the file.
        origin: what was read and how.
        shapes: key -> shape of each parameter that the checkpoint says something about, from its header alone.
        relative: whether it holds changes to a backbone: then keys may be missing.
        optional: keys that may be missing all the same, and are then the backbone's.
    """

    relative = False
    optional: frozenset[str] = frozenset()

    def __init__(self, container: Container, origin: Mapping[str, Any]) -> None:
        self.container, self.origin = container, dict(origin)
        self.path = Path(container.path)
        self.shapes = self._read_shapes()

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return self.container.files

    @abstractmethod
    def on(self, base: Weights) -> Weights:
        """The expert's weights as the vision tower of a backbone, each made when it is asked for."""

    def fingerprint(self) -> str:
        """Hash of all that decides the weights: the files, and what was chosen from them."""
        chosen = [(name, self.origin.get(name)) for name in ("kind", "names", "scale")]
        return digest([fingerprint(file) for file in self.files], chosen)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.shapes)} parameters)"

    @abstractmethod
    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        """See :attr:`shapes`; raises an ``InputError`` for what cannot be the weights of a tower."""

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, which must be of floating point."""
        shape, dtype = self.container.entries[name]
        if dtype not in FLOATS:
            remedy = f"save it as one of {', '.join(FLOATS)}"
            raise InputError(f"{self.path}: {name} is stored as {dtype}, which weights are not; {remedy}")
        return shape

    def _shape_of(self, parts: Sequence[tuple[Place, str]]) -> tuple[int, ...]:
        """Shape of a parameter that is held whole, or of which there are thirds."""
        names = ", ".join(name for _, name in parts)
        shapes = [self._shape(name) for _, name in parts]
        thirds = [place.third for place, _ in parts]
        if len(set(thirds)) < len(parts) or (None in thirds and len(parts) > 1):
            raise InputError(f"{self.path}: {names} are one parameter stored twice; keep one")
        if thirds == [None]:
            return shapes[0][::-1] if parts[0][0].transposed else shapes[0]
        if len(set(shapes)) > 1 or not shapes[0]:
            raise InputError(f"{self.path}: {names} are {', '.join(map(str, shapes))}, not of one attention layer; save it again")
        return (3 * shapes[0][0], *shapes[0][1:])


class CheckpointWeights(Expert, Mapping[str, Tensor]):
    """Weights of one vision tower in a checkpoint: a mapping of open_clip's keys to tensors.

    A tensor is read at access, comes in the stored dtype, and may be a view of the mapped file: do not change it in place.

    Args:
        container: of the tensors.
        parts: what each key is made of.
        origin: what was read and how, for the record of a merge.
        optional: keys that may be missing.

    Raises:
        InputError: when parts of a parameter are missing or do not fit together, or a tensor is not of floating point.
    """

    def __init__(
        self, container: Container, parts: Parts, origin: Mapping[str, Any], optional: frozenset[str] = frozenset()
    ) -> None:
        self.parts, self.optional = parts, optional
        super().__init__(container, origin)

    def on(self, base: Weights) -> Weights:
        """These weights; what is missing is the backbone's own."""
        if all(key in self.parts for key in base):
            return self
        return MadeOn(base, lambda key: self[key] if key in self.parts else base[key])

    def __getitem__(self, key: str) -> Tensor:
        found = [self._read(place, name) for place, name in self.parts[key]]
        return found[0] if len(found) == 1 else torch.cat(found)

    def __contains__(self, key: object) -> bool:
        return key in self.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def _read(self, place: Place, name: str) -> Tensor:
        tensor = self.container.read(name)
        return tensor.T if place.transposed else tensor

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: self._whole_shape(parts) for key, parts in self.parts.items()}

    def _whole_shape(self, parts: Sequence[tuple[Place, str]]) -> tuple[int, ...]:
        if parts[0][0].third is not None and [place.third for place, _ in parts] != [0, 1, 2]:
            names = ", ".join(name for _, name in parts)
            raise InputError(f"{self.path}: {names} are not query, key and value together; copy or download it again")
        return self._shape_of(parts)


class Differences(Expert):
    """A task vector in a file: differences to the backbone, zero for the parameters that are missing.

    Args:
        differences: of the parameters.
        scale: what they are multiplied with.
    """

    relative = True

    def __init__(self, differences: CheckpointWeights, scale: float = 1.0) -> None:
        self.differences, self.scale = differences, scale
        super().__init__(differences.container, {**differences.origin, "kind": "delta", "scale": scale})

    def on(self, base: Weights) -> Weights:
        """The backbone plus the scaled differences, float32."""

        def made(key: str) -> Tensor:
            if key not in self.differences:
                return base[key]
            return torch.add(base[key].float(), self.differences[key].to(base[key].device), alpha=self.scale)

        return Differing(base, made, self.difference)

    def difference(self, key: str) -> Tensor | None:
        """How a parameter differs from the backbone's, float32, new memory; ``None`` where it does not."""
        return self.differences[key].to(torch.float32, copy=True).mul_(self.scale) if key in self.differences else None

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.differences.shapes


class MadeOn(Mapping[str, Tensor]):
    """Weights with the keys of a backbone, each made when it is asked for."""

    def __init__(self, base: Weights, make: Callable[[str], Tensor]) -> None:
        self._base, self._make = base, make

    def __getitem__(self, key: str) -> Tensor:
        return self._make(key)

    def __contains__(self, key: object) -> bool:
        return key in self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


class Differing(MadeOn):
    """A backbone with differences.

    Args:
        difference: see :meth:`Differences.difference`.
    """

    def __init__(self, base: Weights, make: Callable[[str], Tensor], difference: Callable[[str], Tensor | None]) -> None:
        super().__init__(base, make)
        self.difference = difference
