"""What the demo's pictures show: eight concepts, each with its classes and a function that draws one of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from mergekit_vision.demo.drawing import FONTS, Canvas, Color, ring

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

RED, BLUE, YELLOW, WHITE, BLACK = (200, 30, 35), (25, 75, 185), (250, 205, 30), (245, 245, 245), (25, 25, 25)


@dataclass(frozen=True)
class Concept:
    """A kind of picture with its classes.

    Attributes:
        classes: names, by class index.
        paint: draws a class on a canvas.
        paper: color of the background in the concept's task. As data sets of different origin do, each task looks its own way.
        captions: texts for pre-training; ``{}`` stands for the class name.
        turn: largest angle by which a picture is turned, in degrees.
        colored: whether the picture has one color besides the background's, so that a caption can name it.
    """

    classes: tuple[str, ...]
    paint: Callable[[Canvas, int], None]
    paper: str
    captions: tuple[str, ...]
    turn: float = 20.0
    colored: bool = True


def shape(canvas: Canvas, label: int) -> None:
    """A filled figure."""
    _SHAPES[label](canvas)


def _star(canvas: Canvas) -> None:
    outer, inner = ring(5), ring(5, 0.42, start=-54.0)
    canvas.polygon([point for pair in zip(outer, inner, strict=True) for point in pair])


def _cross(canvas: Canvas) -> None:
    arm = canvas.between(0.25, 0.4)
    canvas.polygon([(-0.95, -arm), (0.95, -arm), (0.95, arm), (-0.95, arm)])
    canvas.polygon([(-arm, -0.95), (arm, -0.95), (arm, 0.95), (-arm, 0.95)])


def _heart(canvas: Canvas) -> None:
    canvas.disc(-0.45, -0.35, 0.5)
    canvas.disc(0.45, -0.35, 0.5)
    canvas.polygon([(-0.9, -0.13), (0.0, -0.35), (0.9, -0.13), (0.0, 0.95)])


def _ring(canvas: Canvas) -> None:
    canvas.disc(0, 0, 0.95)
    canvas.disc(0, 0, canvas.between(0.45, 0.65), canvas.back)


def _crescent(canvas: Canvas) -> None:
    canvas.disc(0, 0, 0.95)
    canvas.disc(0.45, -0.1, 0.8, canvas.back)


def _semicircle(canvas: Canvas) -> None:
    canvas.polygon([(math.cos(step * math.pi / 20), 0.45 - math.sin(step * math.pi / 20)) for step in range(21)])


_SHAPES: tuple[Callable[[Canvas], None], ...] = (
    lambda canvas: canvas.disc(0, 0, 0.9),
    lambda canvas: canvas.polygon(ring(4, 1.1, start=-45.0)),
    lambda canvas: canvas.polygon(ring(3)),
    lambda canvas: canvas.polygon(ring(5)),
    _star,
    _cross,
    _heart,
    _ring,
    _crescent,
    _semicircle,
)


def texture(canvas: Canvas, label: int) -> None:
    """A pattern over the whole picture."""
    step = canvas.between(0.5, 0.8)
    places = [step * place + canvas.between(0, 0.1) for place in range(-7, 8)]
    _TEXTURES[label](canvas, step, places)


def _stripes(canvas: Canvas, step: float, places: list[float], rise: float, across: bool = False) -> None:
    for place in places:
        ends = [(-5.0, place - 5 * rise), (5.0, place + 5 * rise)]
        canvas.line([(y, x) for x, y in ends] if across else ends, 0.45 * step)


def _checks(canvas: Canvas, step: float, places: list[float]) -> None:
    for row, y in enumerate(places):
        for x in places[row % 2 :: 2]:
            canvas.polygon([(x, y), (x + step, y), (x + step, y + step), (x, y + step)])


def _dots(canvas: Canvas, step: float, places: list[float]) -> None:
    for y in places:
        for x in places:
            canvas.disc(x, y, 0.28 * step)


def _grid(canvas: Canvas, step: float, places: list[float]) -> None:
    for across in (False, True):
        for place in places:
            canvas.line([(place, -5), (place, 5)] if across else [(-5, place), (5, place)], 0.2 * step)


def _zigzag(canvas: Canvas, step: float, places: list[float]) -> None:
    for y in places:
        canvas.line([(step * x / 2, y + (0.25 if x % 2 else -0.25) * step) for x in range(-12, 13)], 0.3 * step)


def _bricks(canvas: Canvas, step: float, places: list[float]) -> None:
    for row, y in enumerate(places):
        canvas.line([(-5, y), (5, y)], 0.16 * step)
        for x in places[row % 2 :: 2]:
            canvas.line([(x, y), (x, y + step)], 0.16 * step)


def _rings(canvas: Canvas, step: float, places: list[float]) -> None:
    for number in range(9, 0, -1):
        canvas.disc(0, 0, 0.5 * step * number, canvas.color if number % 2 else canvas.back)


def _rays(canvas: Canvas, step: float, places: list[float]) -> None:
    rim = ring(10 + 2 * canvas.choice(4), 5.0)
    for near, far in zip(rim[::2], rim[1::2], strict=True):
        canvas.polygon([(0, 0), near, far])


_TEXTURES: tuple[Callable[[Canvas, float, list[float]], None], ...] = (
    lambda canvas, step, places: _stripes(canvas, step, places, 0.0),
    lambda canvas, step, places: _stripes(canvas, step, places, 0.0, across=True),
    lambda canvas, step, places: _stripes(canvas, step, places, -1.0),
    _checks,
    _dots,
    _grid,
    _zigzag,
    _bricks,
    _rings,
    _rays,
)


def count(canvas: Canvas, label: int) -> None:
    """One to seven small things, none upon another."""
    cells = sorted(range(9), key=lambda _: canvas.random.random())[: label + 1]
    kind, radius = canvas.choice(3), canvas.between(0.24, 0.34)
    for cell in cells:
        x, y = (0.8 * (place - 1) + canvas.between(-0.06, 0.06) for place in divmod(cell, 3))
        if kind == 0:
            canvas.disc(x, y, radius)
        else:
            canvas.polygon([(x + u, y + v) for u, v in ring(2 + kind, 1.15 * radius, start=-90.0 if kind == 1 else -45.0)])


def letter(canvas: Canvas, label: int) -> None:
    """A capital letter."""
    canvas.text(LETTERS[label], _font(canvas))


def numeral(canvas: Canvas, label: int) -> None:
    """A printed digit."""
    canvas.text(str(label), _font(canvas))


def _font(canvas: Canvas) -> str:
    return FONTS[canvas.choice(2 + round(canvas.difficulty * (len(FONTS) - 2)))]


def arrow(canvas: Canvas, label: int) -> None:
    """An arrow, of one of three kinds, in one of eight directions."""
    angle, kind = math.radians(45 * label), canvas.choice(3)

    def turned(*points: tuple[float, float]) -> list[tuple[float, float]]:
        cos, sin = math.cos(angle), math.sin(angle)
        return [(cos * x - sin * y, sin * x + cos * y) for x, y in points]

    if kind == 0:
        canvas.line(turned((0, 0.95), (0, -0.6)), 0.26)
        canvas.polygon(turned((0, -1), (0.55, -0.2), (-0.55, -0.2)))
    elif kind == 1:
        canvas.line(turned((0, 0.95), (0, -0.9)), 0.2)
        canvas.line(turned((-0.55, -0.3), (0, -0.9), (0.55, -0.3)), 0.2)
    else:
        canvas.polygon(turned((0, -1), (0.75, 0.85), (0, 0.45), (-0.75, 0.85)))


def clock(canvas: Canvas, label: int) -> None:
    """A clock face at a full hour; 12 stands first."""
    canvas.disc(0, 0, 1.0)
    canvas.disc(0, 0, 0.88, canvas.other_color())
    for x, y in ring(12, 0.74)[:: 1 + 2 * canvas.choice(2)]:
        canvas.disc(x, y, 0.06)
    hour = math.radians(30 * label)
    canvas.line([(0, 0), (0, -0.8)], 0.08)
    canvas.line([(0, 0), (0.5 * math.sin(hour), -0.5 * math.cos(hour))], 0.2)


def sign(canvas: Canvas, label: int) -> None:
    """A traffic sign."""
    _SIGNS[label](canvas)


def _plate(canvas: Canvas, corners: int, start: float, edge: Color, inside: Color, rim: float = 0.72) -> None:
    canvas.polygon(ring(corners, 1.05, start), edge)
    canvas.polygon(ring(corners, 1.05 * rim, start), inside)


def _round(canvas: Canvas, edge: Color, inside: Color, rim: float = 0.74) -> None:
    canvas.disc(0, 0, 1.0, edge)
    canvas.disc(0, 0, rim, inside)


def _stop(canvas: Canvas) -> None:
    _plate(canvas, 8, -67.5, WHITE, RED, 0.9)
    canvas.text("ST", "DejaVuSans-Bold.ttf", 0.55, WHITE)


def _no_entry(canvas: Canvas) -> None:
    canvas.disc(0, 0, 1.0, RED)
    canvas.line([(-0.65, 0), (0.65, 0)], 0.32, WHITE)


def _speed_limit(canvas: Canvas) -> None:
    _round(canvas, RED, WHITE)
    canvas.text(("30", "50", "60", "80")[canvas.choice(4)], "DejaVuSans-Bold.ttf", 0.55, BLACK)


def _warning(canvas: Canvas) -> None:
    _plate(canvas, 3, -90.0, RED, WHITE, 0.62)
    canvas.line([(0, -0.4), (0, 0.1)], 0.16, BLACK)
    canvas.disc(0, 0.32, 0.1, BLACK)


def _parking(canvas: Canvas) -> None:
    _plate(canvas, 4, -45.0, WHITE, BLUE, 0.9)
    canvas.text("P", "DejaVuSans-Bold.ttf", 0.6, WHITE)


def _keep_right(canvas: Canvas) -> None:
    canvas.disc(0, 0, 1.0, BLUE)
    canvas.line([(-0.45, -0.45), (0.35, 0.35)], 0.22, WHITE)
    canvas.polygon([(0.6, 0.6), (0.6, -0.1), (-0.1, 0.6)], WHITE)


def _no_stopping(canvas: Canvas) -> None:
    _round(canvas, RED, BLUE)
    canvas.line([(-0.6, -0.6), (0.6, 0.6)], 0.22, RED)
    canvas.line([(0.6, -0.6), (-0.6, 0.6)], 0.22, RED)


def _end_of_limits(canvas: Canvas) -> None:
    _round(canvas, BLACK, WHITE, 0.9)
    for shift in (-0.2, 0.0, 0.2):
        canvas.line([(-0.55 + shift, 0.55 + shift), (0.55 + shift, -0.55 + shift)], 0.09, BLACK)


_SIGNS: tuple[Callable[[Canvas], None], ...] = (
    _stop,
    lambda canvas: _plate(canvas, 3, 90.0, RED, WHITE, 0.62),
    _no_entry,
    _speed_limit,
    _warning,
    lambda canvas: _plate(canvas, 4, -90.0, WHITE, YELLOW),
    _parking,
    _keep_right,
    _no_stopping,
    _end_of_limits,
)

LETTERS = "ABCEFHKMRSTX"

CONCEPTS = {
    "shapes": Concept(
        ("circle", "square", "triangle", "pentagon", "star", "cross", "heart", "ring", "crescent", "semicircle"),
        shape,
        "white",
        ("a {}", "a picture of a {}", "the shape of a {}"),
    ),
    "textures": Concept(
        (
            "horizontal stripes",
            "vertical stripes",
            "diagonal stripes",
            "checks",
            "dots",
            "grid lines",
            "zigzag lines",
            "bricks",
            "rings",
            "rays",
        ),
        texture,
        "beige",
        ("a pattern of {}", "a texture of {}", "{}"),
        turn=14.0,
    ),
    "counting": Concept(
        NUMBERS[1:8],
        count,
        "lime",
        ("a group of {}", "a count of {}", "a picture of a group of {}"),
    ),
    "letters": Concept(
        tuple(LETTERS),
        letter,
        "yellow",
        ("the letter {}", "a capital letter {}", "a picture of the letter {}"),
    ),
    "arrows": Concept(
        ("up", "upper right", "right", "lower right", "down", "lower left", "left", "upper left"),
        arrow,
        "cyan",
        ("an arrow that points {}", "an arrow to the {}", "a picture of an arrow, {}"),
        turn=14.0,
    ),
    "clocks": Concept(
        tuple(f"{number} o'clock" for number in (NUMBERS[12], *NUMBERS[1:12])),
        clock,
        "pink",
        ("a clock at {}", "a clock that shows {}", "{}"),
        turn=10.0,
        colored=False,
    ),
    "signs": Concept(
        (
            "stop",
            "yield",
            "no entry",
            "speed limit",
            "warning",
            "priority road",
            "parking",
            "keep right",
            "no stopping",
            "end of limits",
        ),
        sign,
        "grey",
        ("a {} sign", "a road sign: {}", "a picture of a {} sign"),
        colored=False,
    ),
    "digits": Concept(
        NUMBERS[:10],
        numeral,
        "lilac",
        ("the digit {}", "the number {}", "a picture of the digit {}"),
    ),
}
"""Name -> concept, in the order of the suite."""
