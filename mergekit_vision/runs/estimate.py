"""How long merging, the search of a coefficient and evaluation take on this machine, and in how much memory: estimates."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mergekit_vision.encoders.backbone import Backbone, stored_weights
from mergekit_vision.merger import Merger
from mergekit_vision.merging.costs import Method, is_scaled, merge_work, method_of
from mergekit_vision.merging.speed import Speed
from mergekit_vision.merging.work import CURVATURES, STEP, Matrix, Sizes
from mergekit_vision.merging.workbench import GRAPH, TOKENS
from mergekit_vision.support.scratch import LARGE

TRIED = 9
"""Coefficients that a search tries, one more or less."""
_NUMBER = 4  # bytes of a weight, pixel value or activation
_ACTIVATIONS = 14  # numbers a token has at once in a block, in units of the width
_IDLE = 480 << 20  # bytes that Python and the libraries take


@dataclass(frozen=True)
class Images:
    """Images of a suite, all tasks together.

    Attributes:
        val: of the splits ``val``; ``None`` where a task's number is not known.
        test: of the splits ``test``.
        decoding: seconds to decode those of each, once.
        prompts: texts of all zero-shot heads.
    """

    val: int | None
    test: int | None
    decoding: Mapping[str, float]
    prompts: int


def estimate(
    mergers: Mapping[str, Merger], backbone: Backbone, sizes: Sizes, images: Images, speed: Speed, batch_size: int, cache: int
) -> dict[str, Any]:
    """What a run costs: ``once`` for all methods, and for each of the ``methods``; seconds and bytes, ``None`` where unknown.

    Args:
        mergers: name -> method.
        backbone: the model.
        sizes: of the merge.
        images: of the suite.
        speed: of this machine.
        batch_size: images a batch.
        cache: bytes of the cache of pixels.
    """
    one = speed.seconds["images"]

    def passes(count: float, split: int | None) -> float | None:
        return None if split is None else count * split * one

    def decoded(split: str, number: int | None) -> float | None:
        seconds = passes(1, number)
        return None if seconds is None else seconds + images.decoding[split]

    found, held = {}, _unmapped(backbone) * _NUMBER
    for name, merger in mergers.items():
        work, method = merge_work(merger, sizes), method_of(merger) or Method()
        found[name] = {
            "merge": None if work is None else speed.of(work),
            "search": passes(TRIED, images.val) if is_scaled(merger) else 0.0,
            "evaluation": passes(method.slower(sizes), images.test),
            "peak_bytes": peak_bytes(merger, backbone, held, sizes, images, batch_size, cache) if work is not None else None,
        }
    once = {"heads": images.prompts * speed.prompt, "experts_val": decoded("val", images.val)}
    return {"once": {**once, "experts_test": decoded("test", images.test)}, "methods": found}


def peak_bytes(merger: Merger, backbone: Backbone, held: int, sizes: Sizes, images: Images, batch_size: int, cache: int) -> int:
    """Memory at the peak of a run that merges, searches and evaluates, without files that are mapped.

    It is that of Python and the libraries, of what is ``held`` of the backbone, of decoded pixels and of the update, and of what
    merging takes, or an evaluation and the weights at a coefficient, whichever is more.
    """
    side = backbone.tower["image_size"]
    pixels = 3 * (side * side if isinstance(side, int) else math.prod(side))
    kept = min(cache, pixels * ((images.val or 0) + (images.test or 0) + sizes.tasks * sizes.proxies))
    width = max(min(pair) for pair in sizes.linears)
    batch = min(batch_size, max(images.test or batch_size, 1))
    evaluating = batch * (_NUMBER * _ACTIVATIONS * width * sizes.tokens + 2 * _NUMBER * pixels)
    model = sizes.parameters * _NUMBER
    return _IDLE + held + kept + model + max(_merging(merger, sizes) + _built_on(merger) * model, model + evaluating)


def parameters(backbone: Backbone) -> int:
    """Numbers in both towers of a backbone."""
    sizes = {"width": 512, "layers": 12, "vocab_size": 49408, "context_length": 77, **backbone.model.get("text_cfg", {})}
    width, layers, words, length = (int(sizes[name]) for name in ("width", "layers", "vocab_size", "context_length"))
    embedded = (words + length + int(backbone.model["embed_dim"])) * width
    vision = sum(math.prod(shape) for shape in backbone.shapes.values())
    return vision + embedded + 12 * width * width * layers


def _unmapped(backbone: Backbone) -> int:
    """Numbers in both towers that are not mapped from a file, but copied into memory."""
    file = stored_weights(backbone.name)
    entries = () if file is None else file.entries.values()
    mapped = sum(math.prod(shape) for shape, dtype in entries if dtype == "float32")
    return max(0, parameters(backbone) - mapped)


def _merging(merger: Merger, sizes: Sizes) -> int:
    """Bytes that merging takes at its peak, besides the result."""
    stack, decomposed = sizes.tasks * sizes.largest * _NUMBER, 6 * sizes.largest * 8
    matrices, name, base = max(2 * stack, stack + decomposed), type(merger).__name__, getattr(merger, "base", None)
    if name not in _BLOCK_BY_BLOCK:
        return matrices + _statistics(merger, sizes)
    if isinstance(base, Merger):
        below = _merging(base, sizes)
    else:
        kept = _KEPT.get((method_of(merger) or Method()).base)
        below = matrices + (0 if kept is None else kept(sizes))
    return max(below, _BLOCK_BY_BLOCK[name](sizes))  # one after the other


def _built_on(merger: Merger) -> int:
    """Models that a method holds besides its own while it merges."""
    if type(merger).__name__ == "FisherFit":
        return 3  # the base, the same shrunk, and the weights that run
    return int(isinstance(getattr(merger, "base", None), Merger) or bool((method_of(merger) or Method()).base))


def _statistics(merger: Merger, sizes: Sizes) -> int:
    """Bytes of what a method keeps of its layers' inputs."""
    name, base = type(merger).__name__, getattr(merger, "base", None)
    below = _statistics(base, sizes) if isinstance(base, Merger) else 0
    kept = _KEPT.get(name) or _BLOCK_BY_BLOCK.get(name)
    if kept is None:
        return below
    whole = getattr(merger, "rank", None) == "energy"
    return below + (_sum(_whole_subspaces, sizes) if whole else kept(sizes))


def _sum(of_matrix: Callable[[Matrix], int], sizes: Sizes) -> int:
    """Bytes of all Linears together."""
    return sum(map(of_matrix, sizes.matrices()))


def _largest_block(of_matrix: Callable[[Matrix], int], sizes: Sizes) -> int:
    """Bytes of the Linears of one block."""
    matrices = sizes.matrices()
    return max(sum(map(of_matrix, matrices[at : at + 4])) for at in range(0, len(matrices), 4))


def _subspaces(x: Matrix) -> int:
    """Of all tasks one Linear's directions, and of the task at work its Gram matrix."""
    return x.tasks * x.rows // x.tasks * min(x.rows, x.columns) * _NUMBER + 8 * x.side**2


def _whole_subspaces(x: Matrix) -> int:
    """The same where all directions are kept until they are shared out by energy."""
    return (x.tasks * _NUMBER + 8) * x.side**2


def _normals(streams: int, sizes: Sizes) -> int:
    """Of the task at work and of all together the normal equations of one block, and what is made of a task's tokens.

    That is a block's task vectors, once in float64, and activations of some tokens. The streams of all tasks lie in files where
    they are large.
    """

    def equations(x: Matrix) -> int:
        return 2 * 8 * (x.columns**2 + x.rows * x.columns) + 3 * _NUMBER * x.rows * x.columns

    width, tokens = min(map(min, sizes.linears)), sizes.proxies * sizes.tokens
    stream = tokens * width * _NUMBER
    in_memory = streams * sizes.tasks * stream if stream < LARGE else stream  # one, before it goes to its file
    return _largest_block(equations, sizes) + in_memory + 20 * min(tokens, TOKENS) * width * _NUMBER


def _fits(sizes: Sizes) -> int:
    """Of one task and block the expert's weights, the merged model's and what is fitted, float32, and three Linears' inputs.

    Three streams where they are not in files. In float64 one Linear's weights, its inputs and outputs for some tokens, and its
    normal equations; besides them activations.
    """
    held, width = sizes.proxies * sizes.tokens, min(map(min, sizes.linears))
    some, streams = min(held, STEP), 3 if held * width * _NUMBER < LARGE else 1  # one, before it goes to its file

    def equations(rows: int, columns: int) -> int:
        return 8 * (some * (3 * columns + 4 * rows) + 5 * columns**2 + 6 * rows * columns)

    weights = 3 * sum(rows * columns for rows, columns in sizes.linears[:4])
    rows_kept = (3 + streams) * held + 20 * min(held, TOKENS)
    return _NUMBER * (weights + rows_kept * width) + max(equations(*shape) for shape in sizes.linears)


def _curvatures(sizes: Sizes) -> int:
    """Of all tasks second moments of Linears' inputs and of gradients by their outputs, as many as are held at once.

    Besides them the whole matrices of one Linear, and what is kept of some images for the way back.
    """

    def halves(x: Matrix) -> int:
        return x.tasks * 4 * (x.columns**2 + x.rows**2)

    held = min(_sum(halves, sizes), CURVATURES) + 3 * max(map(halves, sizes.matrices()))
    blocks, width = len(sizes.linears) // 4, max(map(min, sizes.linears))
    return held + GRAPH * sizes.tokens * 31 * blocks * width * _NUMBER


_KEPT: Mapping[str, Callable[[Sizes], int]] = {  # method -> bytes
    "ESM": partial(_sum, _subspaces),
    "ESMPP": partial(_sum, _subspaces),
    "ESMPPBayes": partial(_sum, _subspaces),
    "FisherFit": _curvatures,
}
_BLOCK_BY_BLOCK: Mapping[str, Callable[[Sizes], int]] = {  # the same of methods that do it after they are done with their base
    "RegMean": partial(_normals, 1),
    "FeatCal": partial(_normals, 2),
    "ESMPPFit": _fits,
}
