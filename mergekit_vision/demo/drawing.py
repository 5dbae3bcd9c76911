"""A small canvas: seeded pose, colors, background and noise around whatever a task draws.

Chance comes from Python's own generator, whose sequence for a seed never changes, and fonts are those that matplotlib ships, so
an image is the same on every machine up to the rounding of Pillow's rasteriser.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
"""Side of an image in pixels."""

FINE = 3 * SIZE
"""Side of the canvas, which is averaged down to :data:`SIZE`: that smooths the edges."""

COLORS = {
    "red": (214, 40, 40),
    "orange": (243, 132, 20),
    "yellow": (246, 210, 40),
    "green": (42, 150, 62),
    "cyan": (60, 200, 210),
    "blue": (38, 80, 200),
    "purple": (125, 50, 165),
    "pink": (245, 140, 185),
    "brown": (122, 78, 40),
    "black": (22, 22, 22),
    "white": (242, 242, 242),
    "grey": (172, 174, 178),
    "lime": (165, 225, 95),
    "lilac": (190, 165, 240),
    "beige": (222, 190, 145),
}

_NAMES = tuple(COLORS)

FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBolIta.ttf",
    "cmr10.ttf",
    "cmtt10.ttf",
)

Point = tuple[float, float]
Color = tuple[int, int, int]


class Canvas:
    """One image in the making; tasks draw in a frame of -1 to 1 (y down) that is moved, scaled and turned.

    Args:
        random: the only source of chance.
        difficulty: 0 (clean, centered, upright) to 1 (moved, turned, cluttered, noisy, of low contrast).
        turn: largest angle in degrees by which the frame is turned at difficulty 1.
        paper: name of the background's color; any that leaves room for a darker one by default.

    Attributes:
        ink: name of the foreground's color.
        paper: name of the background's color.
        color: of the foreground, RGB.
        back: color of the background, which also cuts holes into the foreground.
    """

    def __init__(self, random: Random, difficulty: float, turn: float = 20.0, paper: str | None = None) -> None:
        self.random, self.difficulty = random, difficulty
        self.ink, self.paper = self._colors(paper)
        self.color = self._tint(self.ink)
        self.back = self._tint(self.paper)
        self._image = Image.new("RGB", (FINE, FINE), self.back)
        self._draw = ImageDraw.Draw(self._image)
        self._clutter()
        self.place(turn)

    def place(self, turn: float = 0.0) -> None:
        """Put the frame at a random place, in a random size and at a random angle."""
        self._scale = FINE * self.between(0.42 - 0.16 * self.difficulty, 0.46)
        room = (FINE / 2 - self._scale) * self.difficulty
        self._center = (FINE / 2 + self.between(-room, room), FINE / 2 + self.between(-room, room))
        self._angle = math.radians(self.between(-turn, turn) * self.difficulty)

    def between(self, low: float, high: float) -> float:
        """A random number."""
        return low + (high - low) * self.random.random()

    def choice(self, number: int) -> int:
        """A random index below ``number``."""
        return int(number * self.random.random())

    def other_color(self) -> Color:
        """A color lighter than the foreground's, as the background's is."""
        while sum(COLORS[name := self._name()]) - sum(COLORS[self.ink]) < 120:
            pass
        return self._tint(name)

    def polygon(self, points: Iterable[Point], color: Color | None = None) -> None:
        """Fill a polygon."""
        self._draw.polygon([self._point(*point) for point in points], fill=color or self.color)

    def disc(self, x: float, y: float, radius: float, color: Color | None = None) -> None:
        """Fill a circle."""
        (u, v), r = self._point(x, y), radius * self._scale
        self._draw.ellipse((u - r, v - r, u + r, v + r), fill=color or self.color)

    def line(self, points: Iterable[Point], width: float, color: Color | None = None) -> None:
        """Draw a line through points; ``width`` in units of the frame."""
        thick = max(2, round(width * self._scale))
        self._draw.line([self._point(*point) for point in points], fill=color or self.color, width=thick, joint="curve")

    def text(self, text: str, font: str, size: float = 1.0, color: Color | None = None) -> None:
        """Write one or two characters in the middle of the frame, turned with it."""
        self.stamp(_glyph(text, font), size, color)

    def stamp(self, mask: Image.Image, size: float = 1.0, color: Color | None = None) -> None:
        """Paint through a mask (mode ``L``, square), which fills ``size`` of the frame."""
        half, side = self._scale * size, mask.width
        ratio = side / (2 * half)
        cos, sin = math.cos(self._angle) * ratio, math.sin(self._angle) * ratio
        (u, v), middle = self._center, side / 2
        inverse = (cos, sin, middle - cos * u - sin * v, -sin, cos, middle + sin * u - cos * v)
        placed = mask.transform((FINE, FINE), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
        self._image.paste(color or self.color, mask=placed)

    def finish(self) -> Image.Image:
        """The image, averaged down, with uneven light and noise: RGB, :data:`SIZE` pixels square."""
        pixels = np.asarray(self._image.reduce(FINE // SIZE), dtype=np.int16)
        if self.difficulty:
            pixels = (pixels + self._light() + self._grain()).clip(0, 255)
        return Image.fromarray(pixels.astype(np.uint8))

    def _colors(self, given: str | None) -> tuple[str, str]:
        """A darker one on a lighter one; the less the difficulty, the farther apart."""
        least = 260 - 140 * self.difficulty
        while True:
            ink, paper = self._name(), given or self._name()
            if sum(COLORS[paper]) - sum(COLORS[ink]) >= least:
                return ink, paper

    def _name(self) -> str:
        return _NAMES[self.choice(len(_NAMES))]

    def _tint(self, name: str) -> Color:
        reach = 8 + int(22 * self.difficulty)
        red, green, blue = (min(255, max(0, value + self.choice(2 * reach + 1) - reach)) for value in COLORS[name])
        return red, green, blue

    def _light(self) -> npt.NDArray[np.int16]:
        """Brighter or darker towards one side, ``[SIZE, SIZE, 1]``."""
        across, down = (int(70 * self.difficulty * self.between(-1, 1)) for _ in range(2))
        axis = np.arange(1 - SIZE, SIZE, 2, dtype=np.int16)
        return ((across * axis[None, :, None] + down * axis[:, None, None]) // SIZE).astype(np.int16)

    def _grain(self) -> npt.NDArray[np.int16]:
        """Noise of a random strength, the sum of two uniform numbers, ``[SIZE, SIZE, 3]``."""
        reach = int(self.difficulty * self.between(4, 36))
        dice = np.frombuffer(self.random.randbytes(2 * 3 * SIZE * SIZE), dtype=np.uint8).astype(np.int16)
        first, second = dice.reshape(2, SIZE, SIZE, 3)
        grain: npt.NDArray[np.int16] = (first + second - np.int16(255)) * np.int16(reach) // np.int16(128)
        return grain

    def _clutter(self) -> None:
        """Stray lines and spots on the paper, close to it in color."""
        for _ in range(self.choice(1 + round(6 * self.difficulty))):
            stray = self.other_color()
            red, green, blue = ((2 * back + other) // 3 for back, other in zip(self.back, stray, strict=True))
            x, y, u, v = (self.choice(FINE) for _ in range(4))
            if self.choice(2):
                self._draw.line((x, y, u, v), fill=(red, green, blue), width=2 + self.choice(4))
            else:
                r = 3 + self.choice(8)
                self._draw.ellipse((x - r, y - r, x + r, y + r), fill=(red, green, blue))

    def _point(self, x: float, y: float) -> Point:
        cos, sin = math.cos(self._angle) * self._scale, math.sin(self._angle) * self._scale
        return self._center[0] + cos * x - sin * y, self._center[1] + sin * x + cos * y


def ring(corners: int, radius: float = 1.0, start: float = -90.0) -> list[Point]:
    """Corners of a regular polygon; ``start`` is the angle of the first in degrees (-90 points up).

    >>> [(round(x, 3), round(y, 3)) for x, y in ring(4)]
    [(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)]
    """
    angles = (math.radians(start + 360 * corner / corners) for corner in range(corners))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


@lru_cache(maxsize=1024)
def _glyph(text: str, font: str) -> Image.Image:
    """Mask of a text, centered in a square of 64 pixels."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font
    face = ImageFont.truetype(str(path), 60, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = face.getbbox(text)
    side = int(max(right - left, bottom - top)) + 4
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).text(((side - left - right) / 2, (side - top - bottom) / 2), text, fill=255, font=face)
    return mask.resize((64, 64), Image.Resampling.BILINEAR)
