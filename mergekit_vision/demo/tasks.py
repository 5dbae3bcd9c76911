"""The demo's eight tasks as map-style data sets, drawn when they are read."""

from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image

from mergekit_vision.demo.concepts import CONCEPTS
from mergekit_vision.demo.drawing import Canvas
from mergekit_vision.errors import InputError

SIZES = {"train": 8000, "val": 200, "test": 300}
"""Images a split."""

_HANDWRITTEN = Path(__file__).with_name("digits.npz")
_SHARES = {"test": (0, 500), "val": (500, 800), "train": (800, 1797)}
"""Which of the 1797 handwritten digits a split draws from."""


class DemoTask:
    """One task: pictures of a concept at full difficulty, classes in turn.

    An image depends on nothing but task, split, index and ``seed``; splits never share a seed.

    Args:
        split: ``train``, ``val`` or ``test``.
        seed: of all images.
        size: number of images; that of :data:`SIZES` by default.

    Attributes:
        classes: names, by class index.
        targets: class index of every image.

    Raises:
        InputError: for an unknown split.

    >>> from mergekit_vision.demo.tasks import Shapes
    >>> image, label = Shapes("test")[4]
    >>> image.size, Shapes.classes[label]
    ((32, 32), 'star')
    """

    concept: str
    classes: tuple[str, ...]

    def __init__(self, split: str, seed: int = 0, size: int | None = None) -> None:
        if split not in SIZES:
            raise InputError(f"demo task {self.concept}: no split {split!r}; it has {', '.join(SIZES)}")
        self.split, self.seed = split, seed
        self.targets = self._labels(SIZES[split] if size is None else size)

    def __init_subclass__(cls) -> None:
        cls.concept = cls.__name__.lower()
        cls.classes = CONCEPTS[cls.concept].classes

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Draw one image: RGB of 32 x 32 pixels, and its class index."""
        label = self.targets[index]
        random, concept = Random(f"{self.concept}/{self.split}/{self.seed}/{index}"), CONCEPTS[self.concept]
        canvas = Canvas(random, 1.0, concept.turn, concept.paper)
        self._paint(canvas, index)
        return canvas.finish(), label

    def _labels(self, size: int) -> list[int]:
        return [index % len(self.classes) for index in range(size)]

    def _paint(self, canvas: Canvas, index: int) -> None:
        CONCEPTS[self.concept].paint(canvas, self.targets[index])


class Shapes(DemoTask):
    """Ten geometric figures."""


class Textures(DemoTask):
    """Ten patterns."""


class Counting(DemoTask):
    """One to seven small things."""


class Letters(DemoTask):
    """Twelve capital letters in nine fonts."""


class Arrows(DemoTask):
    """Arrows in eight directions."""


class Clocks(DemoTask):
    """Clock faces at the twelve full hours."""


class Signs(DemoTask):
    """Ten traffic signs."""


class Digits(DemoTask):
    """Handwritten digits (see ``NOTICE``), in random colors on random backgrounds.

    The splits share no handwriting. One that is longer than its share of it shows the same digits again, drawn anew.
    """

    def _labels(self, size: int) -> list[int]:
        return [int(_handwritten()[1][self._row(index)]) for index in range(size)]

    def _paint(self, canvas: Canvas, index: int) -> None:
        small = Image.fromarray(_handwritten()[0][self._row(index)] * np.uint8(15))
        canvas.stamp(small.resize((64, 64), Image.Resampling.BICUBIC))

    def _row(self, index: int) -> int:
        first, end = _SHARES[self.split]
        return first + index % (end - first)


@lru_cache(maxsize=1)
def _handwritten() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images ``[1797, 8, 8]`` with values from 0 to 16, and classes ``[1797]``."""
    with np.load(_HANDWRITTEN) as file:
        return file["images"], file["labels"]
