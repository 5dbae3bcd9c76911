"""Work, counted from sizes alone: what products and decompositions of matrices consist of."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mergekit_vision.functional import fisher, streams
from mergekit_vision.functional.gram import GRAM_BLOCK
from mergekit_vision.functional.polar_columns import SIDE

Unit = Literal["bytes", "calls", "float32", "float64", "eigh", "polar", "random", "ranked", "images"]
"""What is counted: bytes moved by elementwise operations; calls of torch; floating-point operations of matrix products of each
precision; cubed sides of eigendecompositions in float64, and of polar factors of large float32 matrices; random numbers; numbers
that are sorted or selected by rank; images through the vision tower."""

Work = Counter[Unit]
"""Unit -> how many."""

_LINEAR = re.compile(
    r"visual\.transformer\.resblocks\.\d+\.(attn\.in_proj_weight|(attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.weight)"
)
CURVATURES = fisher.HELD
"""Bytes of curvatures that FisherFit holds at once."""
STEP = streams.STEP
"""Tokens whose layer inputs methods that go block by block hold at once."""
APART = 1.15
"""Time of the same operations in a merge, which goes from tensor to tensor, relative to a measurement that repeats one."""


class Matrix(NamedTuple):
    """A matrix that is merged.

    Attributes:
        rows: ``d_out``.
        columns: ``d_in``.
        tasks: experts that are merged.
        inputs: rows of layer inputs that proxy images give, for each task.
    """

    rows: int
    columns: int
    tasks: int
    inputs: int

    @property
    def side(self) -> int:
        """The smaller side."""
        return min(self.rows, self.columns)

    @property
    def length(self) -> int:
        """The larger side."""
        return max(self.rows, self.columns)


@dataclass(frozen=True)
class Sizes:
    """What the cost of a merge depends on.

    Attributes:
        linears: ``(d_out, d_in)`` of each Linear layer of the blocks.
        outside: shapes of the matrices outside of them.
        parameters: numbers in the vision tower.
        tensors: in how many tensors.
        tokens: of an image.
        tasks: experts that are merged.
        proxies: proxy images a task.
    """

    linears: tuple[tuple[int, int], ...]
    outside: tuple[tuple[int, int], ...]
    parameters: int
    tensors: int
    tokens: int
    tasks: int
    proxies: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], tasks: int, proxies: int) -> "Sizes":
        """Sizes of a vision tower with these shapes, by open_clip's keys."""
        pairs = {key: (shape[0], shape[1]) for key, shape in shapes.items() if len(shape) == 2}
        linears = tuple(pair for key, pair in pairs.items() if _LINEAR.fullmatch(key))
        outside = tuple(pair for key, pair in pairs.items() if not _LINEAR.fullmatch(key))
        numbers = sum(math.prod(shape) for shape in shapes.values())
        tokens = shapes["visual.positional_embedding"][0]
        return cls(linears, outside, numbers, len(shapes), tokens, tasks, proxies)

    def matrices(self, everywhere: bool = False) -> list[Matrix]:
        """The matrices of the blocks or, ``everywhere``, all."""
        pairs = (*self.linears, *(self.outside if everywhere else ()))
        return [Matrix(rows, columns, self.tasks, self.proxies * self.tokens) for rows, columns in pairs]

    @property
    def largest(self) -> int:
        """Numbers in the largest matrix."""
        return max((rows * columns for rows, columns in self.linears), default=0)


def product(m: int, k: int, n: int, unit: Unit = "float64") -> Work:
    """Matrix product ``[m, k] @ [k, n]``.

    >>> product(2, 3, 4)["float64"]
    48
    """
    return Work({unit: 2 * m * k * n, "calls": 1})


def gram(rows: int, side: int, unit: Unit = "float64") -> Work:
    """``Aᵀ A`` of ``A [rows, side]``, of which little more than one triangle is computed."""
    return Work({unit: rows * side * (side + min(side, GRAM_BLOCK)), "calls": 2 * math.ceil(side / GRAM_BLOCK)})


def eigh(side: int) -> Work:
    """Eigendecomposition of a symmetric matrix, float64."""
    return Work({"eigh": side**3, "calls": 4})


def svd(m: int, n: int, k: int) -> Work:
    """``k`` leading singular triplets of ``[m, n]``, through the smaller Gram matrix."""
    side, length = sorted((m, n))
    return gram(length, side) + eigh(side) + product(length, side, k) + Work({"calls": 120})


def polar(m: int, n: int, columns: int, unit: Unit = "float64") -> Work:
    """Inverse root of the smaller Gram matrix of ``[m, n]``, times a matrix of so many columns; the products in a precision."""
    side, length = sorted((m, n))
    applied = gram(side, side, unit) + product(side, side, columns, unit)
    return gram(length, side) + eigh(side) + applied + Work({"calls": 120})


def polar_product(m: int, p: int, n: int, single: bool) -> Work:
    """Product of the polar factors of ``[m, p]`` and ``[p, n]``; ``single`` where they are float32."""
    right = polar(p, n, max(p, n))
    if single and min(m, p) >= SIDE:
        return right + Work({"polar": min(m, p) ** 3}) + product(m, p, n, "float32")
    return right + polar(m, p, n) + product(m, p, n)


def times(work: Work, count: float) -> Work:
    """So many times the work."""
    return Work({unit: round(count * amount) for unit, amount in work.items()})


def total(parts: Iterable[Work]) -> Work:
    """The work of all parts."""
    found = Work()
    for part in parts:
        found.update(part)
    return found
