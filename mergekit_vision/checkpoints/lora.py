"""Low-rank changes to a backbone."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_vision.checkpoints.container import Container
from mergekit_vision.checkpoints.places import Place, bias_of
from mergekit_vision.checkpoints.weights import CheckpointWeights, Expert, MadeOn, Parts, Weights
from mergekit_vision.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]
"""Key -> shape."""


def finite(value: object) -> float | None:
    """A number from a file, as far as it is one and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


class Update(NamedTuple):
    """A low-rank change to one weight: ``ΔW = scale · B A``.

    Attributes:
        place: of the weight.
        down: name of ``A [r, d_in]``.
        up: name of ``B [d_out, r]``.
        scale: the factor.
        magnitude: name of DoRA's row norms ``[d_out]``; ``None`` for plain LoRA.
        shift: name of the change of the bias, up to the factor; ``None`` without.
    """

    place: Place
    down: str
    up: str
    scale: float
    magnitude: str | None = None
    shift: str | None = None


class Adapted(MadeOn):
    """A backbone with an adapter.

    Args:
        factors: see :meth:`Adapter.factors`.
    """

    def __init__(
        self, base: Weights, make: Callable[[str], Tensor], factors: Callable[[str], tuple[Tensor, Tensor] | None]
    ) -> None:
        super().__init__(base, make)
        self.factors = factors


class Adapter(Expert):
    """Low-rank changes to a backbone. They stay low-rank: a layer's dense weight exists only while it is used.

    Args:
        container: of the tensors.
        updates: the low-rank changes.
        replaced: parameters that the adapter holds whole, or thirds of them.
        origin: what was read and how, for the record of a merge.
        base: weights that the file brings along to be adapted, instead of the backbone's: with them it is a whole tower.
        more: other files that were read.

    Raises:
        InputError: when factors do not fit together, or not the weight in the same file that they are for.
    """

    def __init__(
        self,
        container: Container,
        updates: Iterable[Update],
        replaced: Parts,
        origin: Mapping[str, Any],
        base: CheckpointWeights | None = None,
        more: tuple[Path, ...] = (),
    ) -> None:
        self.updates: dict[str, list[Update]] = {}
        for update in updates:
            self.updates.setdefault(update.place.key, []).append(update)
            if update.shift is not None:
                self.updates.setdefault(bias_of(update.place).key, []).append(update)
        self.replaced, self.base, self._more = replaced, base, more
        self.relative, self.optional = base is None, frozenset() if base is None else base.optional
        super().__init__(container, origin)
        downs = [update.down for updates in self.updates.values() for update in updates]
        self.origin["rank"] = max(container.entries[name].shape[0] for name in downs)
        scales = sorted({update.scale for updates in self.updates.values() for update in updates})
        self.origin["scale"] = scales[0] if len(scales) == 1 else scales

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        return (*self.container.files, *self._more)

    def on(self, base: Weights) -> Weights:
        """The backbone with the changes, float32 where there are any."""
        under = base if self.base is None else self.base.on(base)
        return Adapted(base, lambda key: self._made(key, under[key]), self.factors)

    def factors(self, key: str) -> tuple[Tensor, Tensor] | None:
        """``up [d_out, r]`` and ``down [r, d_in]``, whose product is the change of a weight; ``None`` where it is not one.

        Thirds of the attention's weight that were adapted apart stand beside each other in ``r``.
        """
        updates = self.updates.get(key, [])
        plain = self.base is None and key not in self.replaced
        if not plain or not updates or any(update.place.key != key or update.magnitude for update in updates):
            return None
        pairs = [self._factored(update) for update in updates]
        return torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])

    def _factored(self, update: Update) -> tuple[Tensor, Tensor]:
        up, down = (self.container.read(name).float() for name in (update.up, update.down))
        if update.place.transposed:
            up, down = down.T, up.T
        whole = up.new_zeros(self.shapes[update.place.key][0], up.shape[1])
        _rows(whole, update.place).copy_(up).mul_(update.scale)
        return whole, down

    def _made(self, key: str, weight: Tensor) -> Tensor:
        if key not in self.updates and key not in self.replaced:
            return weight
        weight = weight.to(torch.float32, copy=True)
        for place, name in self.replaced.get(key, ()):
            value = self._float(name, weight)
            _rows(weight, place).copy_(value.T if place.transposed else value)
        for update in self.updates.get(key, ()):
            self._add(update, key, weight)
        return weight

    def _add(self, update: Update, key: str, weight: Tensor) -> None:
        """Add one change to the rows of the weight, or of the bias, that it is for; in place."""
        if key != update.place.key:
            assert update.shift is not None
            _rows(weight, bias_of(update.place)).add_(self._float(update.shift, weight), alpha=update.scale)
            return
        change = self._float(update.up, weight) @ self._float(update.down, weight)
        rows = _rows(weight, update.place)
        rows = rows.T if update.place.transposed else rows  # as the library of the adapter has them, a view
        rows.add_(change, alpha=update.scale)
        if update.magnitude is not None:  # DoRA (arXiv:2402.09353, equation 5): the norms of the rows are learned apart
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows.mul_(self._float(update.magnitude, weight).reshape(-1, 1) / norms)

    def _float(self, name: str, like: Tensor) -> Tensor:
        return self.container.read(name).to(like.device, torch.float32)

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {key: self._shape_of(parts) for key, parts in self.replaced.items()}
        for update in (update for updates in self.updates.values() for update in updates):
            weight = self._changed_shape(update)
            changed = [(update.place, weight)] + ([] if update.shift is None else [(bias_of(update.place), weight[:1])])
            for place, shape in changed:
                if shapes.setdefault(place.key, shape) != shape:
                    told = f"{update.up} is for {place.key} {shape}, and others for {shapes[place.key]}"
                    raise InputError(f"{self.path}: {told}; they do not belong together")
        return shapes if self.base is None else self._shapes_of_all(self.base.shapes, shapes)

    def _shapes_of_all(self, own: Shapes, changed: Shapes) -> dict[str, tuple[int, ...]]:
        """Shapes of the tower that the file brings along, if it has all that is changed, in the same shape."""
        held = {key: shape for key, shape in changed.items() if key in self.replaced or key in self.optional}
        shapes = {**held, **own}
        odd = next((key for key, shape in changed.items() if shapes.get(key) != shape), None)
        if odd is not None:
            other = f"has it as {shapes[odd]}" if odd in shapes else "lacks it"
            raise InputError(f"{self.path}: its adapter changes {odd} {changed[odd]}, and the tower in the same file {other}")
        return shapes

    def _changed_shape(self, update: Update) -> tuple[int, ...]:
        """Shape of the weight that a change is for, if its factors fit together."""
        down, up = self._shape(update.down), self._shape(update.up)
        if len(down) != 2 or len(up) != 2 or down[0] != up[1]:
            raise InputError(f"{self.path}: {update.down} {down} and {update.up} {up} are not two factors of one matrix")
        out, into = up[0], down[1]
        for name in filter(None, (update.magnitude, update.shift)):
            shape = self._shape(name)
            if math.prod(shape) != out or (name == update.shift and len(shape) != 1):
                raise InputError(f"{self.path}: {name} {shape} does not have a number for each of {out} rows")
        if update.place.transposed:
            return (into, out)
        return (out if update.place.third is None else 3 * out, into)


def _rows(weight: Tensor, place: Place) -> Tensor:
    """The rows of a parameter that a place means, a view."""
    return weight if place.third is None else weight.chunk(3)[place.third]
