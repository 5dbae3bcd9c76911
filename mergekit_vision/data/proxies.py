"""Which unlabeled images a data-dependent merger sees."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.config import config_faults
from mergekit_vision.suites.splits import VAL


@dataclass(frozen=True)
class Proxies:
    """Which unlabeled images a data-dependent merger sees of each task.

    Attributes:
        n: number of images a task; all of them where the split has fewer.
        split: split of the suite they are drawn from.
        seed: of the draw, which is without replacement.
        label: draw from this class index alone.
        source: draw every task's images from this data source instead (out-of-domain), given as in a suite file; relative paths
            are relative to the suite.
        skip: how many images of the draw are passed over before the ``n`` that are taken. Draws of one seed that take what others
            pass over have no image in common.
    """

    n: int = 32
    split: str = VAL
    seed: int = 0
    label: int | None = None
    source: dict[str, Any] | None = None
    skip: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"`proxies.n` must be 1 or more, not {self.n}", of="data")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"`proxies.seed` must lie in 0 to 2**32 - 1, not {self.seed}", of="data")
        if self.skip < 0:
            raise InputError(f"`proxies.skip` must be 0 or more, not {self.skip}", of="data")
        if self.label is not None and self.label < 0:
            raise InputError(f"`proxies.label` must be a class index, 0 or more, not {self.label}", of="data")
        if self.source is not None and (faults := config_faults(self.source)):
            raise InputError(f"`proxies.source`: {'; '.join(faults)}", of="data")

    def draw(self, source: ImageSource) -> list[int]:
        """Indices of the images in ``source``, ascending: what is stored together is then read together.

        Raises:
            InputError: when the source has no image (of the class), or none beyond those that are passed over.
        """
        return sorted(self._drawn(source))

    def _drawn(self, source: ImageSource) -> list[int]:
        """The indices in the order of the draw."""
        pool = np.arange(len(source))
        if self.label is not None:
            pool = np.flatnonzero(np.asarray(source.labels()) == self.label)
        if not len(pool):
            raise InputError("no proxy images" if self.label is None else f"proxies.label: no image has the label {self.label}")
        if len(pool) <= self.skip:
            raise InputError(f"no proxy images are left: there are {len(pool)}, of which {self.skip} are passed over")
        last = min(self.skip + self.n, len(pool))
        chosen = np.random.RandomState(self.seed).choice(len(pool), last, replace=False)[self.skip :]
        return [int(index) for index in pool[chosen]]

    def halves(self) -> "tuple[Proxies, Proxies]":
        """Two draws that share these images, those that there are: one to fit a method on, and one to judge it by.

        Either raises an ``InputError`` where a source has only one image to share.

        Raises:
            InputError: when only one image a task is asked for.

        >>> from mergekit_vision import Proxies
        >>> fitted, judged = Proxies(n=32).halves()
        >>> five_images = range(5)
        >>> len(fitted.draw(five_images)), len(judged.draw(five_images))
        (2, 3)
        """
        if self.n == 1:
            raise InputError(f"`proxies.n` is 1; {_NEEDS_TWO}", of="data")
        return _Half(**vars(self)), _Half(**{**vars(self), "second": True})


_NEEDS_TWO = "a method that sees half of them and is judged by the rest needs 2"


@dataclass(frozen=True)
class _Half(Proxies):
    """The first or the second half of each draw: how large it is depends on how many images a task has."""

    second: bool = False

    def _drawn(self, source: ImageSource) -> list[int]:
        whole = super()._drawn(source)
        if len(whole) == 1:
            raise InputError(f"there is only one image; {_NEEDS_TWO}")
        half = len(whole) // 2
        return whole[half:] if self.second else whole[:half]
