"""How fast this machine does what merging and evaluation consist of, measured in a few seconds."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from mergekit_vision.data.preprocess import eval_transform
from mergekit_vision.encoders.backbone import Backbone, made_up_clip
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.functional.polar_columns import SIDE, polar_columns
from mergekit_vision.merging.work import APART, Sizes, Unit, Work
from mergekit_vision.support.console import track

Clock = Callable[[], float]
"""Gives seconds."""

BUDGET = 0.25
"""Seconds for each measurement, of whose repetitions the median counts."""
LARGEST_SIDE = 768
"""Of the eigendecomposition that is measured; the time of larger ones grows like the cube."""
BLOCKS = 2
"""Of the towers whose passes are measured; the other blocks take as long."""
_NUMBERS = 1 << 20
_TRAFFIC = 1 << 23  # numbers that no cache holds


@dataclass(frozen=True)
class Speed:
    """What one of each unit takes.

    Attributes:
        seconds: unit -> seconds.
        prompt: seconds for one prompt through the text tower.
    """

    seconds: Mapping[Unit, float]
    prompt: float

    def of(self, work: Work) -> float:
        """Seconds of some work of a merge."""
        return APART * sum(amount * self.seconds[unit] for unit, amount in work.items())


def measure(backbone: Backbone, sizes: Sizes, batch_size: int, clock: Clock = time.perf_counter) -> Speed:
    """Measure this machine with a backbone's shapes, on the CPU.

    Args:
        backbone: the model; its weights are made up.
        sizes: of the merge.
        batch_size: images a batch, of which fewer are taken where that takes long.
        clock: gives the seconds that count.
    """
    with _seeded(), torch.inference_mode():
        model = made_up_clip(backbone.name, BLOCKS)
        kernels = _kernels(backbone.tower["width"], max(max(pair) for pair in sizes.linears))
        found: dict[Unit, float] = {}
        for unit in track(list(kernels), "measuring this machine"):
            amount, run = kernels[unit]
            found[unit] = seconds_of(run, clock) / amount
        found["images"] = _per_image(model, backbone, batch_size, clock)
        return Speed(found, _per_prompt(model, backbone, clock))


def _kernels(width: int, largest: int) -> dict[Unit, tuple[float, Callable[[], object]]]:
    """Unit -> how many of it a measurement has, and the measurement."""
    single, small = torch.randn(4 * width, width), torch.randn(width, width)
    double, square = single.double(), torch.randn(min(width, LARGEST_SIDE), min(width, LARGEST_SIDE)).double()
    symmetric, one = square.T @ square, torch.zeros(8)
    numbers, many = torch.randn(_NUMBERS), torch.randn(2, _TRAFFIC)
    side = min(largest, 2 * SIDE)
    left, right = torch.randn(side, side), torch.randn(side, side // 4)  # as wide as an MLP's two layers are to each other
    return {
        "bytes": (12 * _TRAFFIC, lambda: many[0] - many[1]),
        "calls": (300, lambda: [bool(torch.stack((one, one)).sub_(one).isfinite().all()) for _ in range(60)]),
        "float32": (8 * width**3, lambda: single @ small),
        "float64": (8 * width**3, lambda: double @ small.double()),
        "eigh": (len(symmetric) ** 3, lambda: torch.linalg.eigh(symmetric)),
        "polar": (side**3, lambda: polar_columns(left, right)),
        "random": (_NUMBERS, lambda: torch.rand(_NUMBERS)),
        "ranked": (_NUMBERS, lambda: numbers.abs().kthvalue(_NUMBERS // 2)),
    }


def seconds_of(run: Callable[[], object], clock: Clock, budget: float = BUDGET) -> float:
    """Seconds of one of some repetitions, by their median without the first."""
    times, begin = list[float](), clock()
    while len(times) < 2 or clock() - begin < budget:
        start = clock()
        run()
        times.append(clock() - start)
        if times[0] > 2 * budget:
            break
    return median(times[1:] or times)


def _per_image(model: nn.Module, backbone: Backbone, batch_size: int, clock: Clock) -> float:
    """Seconds of one image's pass through the whole vision tower."""
    encoder = VisionEncoder(model.visual)  # type: ignore[arg-type]
    config = backbone.tower
    side, layers = config["image_size"], config["layers"]
    pixels = (side, side) if isinstance(side, int) else tuple(side)
    operations = sum(value.numel() for value in encoder.parameters()) * 2 * len(encoder.visual.positional_embedding)  # type: ignore[arg-type]
    count = max(1, min(batch_size, int(1e10 / operations)))
    images, preprocess = torch.zeros(count, 3, *pixels, dtype=torch.uint8), eval_transform(backbone.preprocess)
    return _whole(lambda: encoder(preprocess.finish(images)), count, min(BLOCKS, layers), layers, clock)


def _whole(run: Callable[[], object], count: int, blocks: int, layers: int, clock: Clock) -> float:
    """Seconds of one of ``count`` inputs in a tower of ``layers`` blocks, of which ``blocks`` are there."""
    return seconds_of(run, clock, 2 * BUDGET) / count * layers / blocks


def _per_prompt(model: nn.Module, backbone: Backbone, clock: Clock) -> float:
    """Seconds of one prompt through the whole text tower."""
    config = backbone.model.get("text_cfg", {})
    layers = config.get("layers", 12)
    tokens = torch.ones(8, config.get("context_length", 77), dtype=torch.int64)
    return _whole(lambda: model.encode_text(tokens), len(tokens), min(BLOCKS, layers), layers, clock)  # type: ignore[operator]


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers each time, and those of others as if none had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
