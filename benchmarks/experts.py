"""Made-up experts of full shape on disk: a random open_clip vision tower and fine-tuned copies of it, with proxy images.

Nothing is learnt; what matters to cost and to numerical difficulty is there: the shapes, task vectors that are low-rank plus
noise with a decaying spectrum, a part of them shared by the tasks, and layer inputs of an actual forward pass.
"""

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import open_clip
import torch
from torch import Tensor

from mergekit_vision.checkpoints import open_weights, save_safetensors
from mergekit_vision.merger import Weights

CHANGE = 0.05  # a task vector's norm, as a share of the backbone's
SHARED, NOISE = 0.3, 0.3  # parts of a task vector that all tasks have, and that is white, beside the task's own part of 1


class Files(NamedTuple):
    """Where a case's inputs lie; one expert and one file of images a task."""

    base: Path
    experts: tuple[Path, ...]
    images: tuple[Path, ...]


def tower(model: str, layers: int | None = None) -> Any:
    """A vision tower without weights (device ``meta``), cut to its first ``layers`` blocks."""
    with quietly(), torch.device("meta"):
        visual = open_clip.create_model(model, load_weights=False, device="meta").visual
    if layers is not None:
        del visual.transformer.resblocks[layers:]
    return visual.eval().requires_grad_(False)


def blocks(visual: Any) -> int:
    """Number of a tower's transformer blocks."""
    return len(visual.transformer.resblocks)


def label(model: str) -> str:
    """A model's name, short enough for a table and a file."""
    return Path(model.removeprefix("local-dir:")).name


def prepare(place: Path, model: str, layers: int | None, tasks: int, proxies: int) -> Files:
    """Make what is not there yet; never more than one expert is in memory.

    Args:
        place: folder of all made-up experts.
        model: open_clip name, or ``local-dir:…``; its shapes are used.
        layers: number of transformer blocks, of which the first are kept; all where ``None``.
        tasks: number of experts. More of them later leave the first as they are.
        proxies: images a task.
    """
    visual = tower(model, layers)
    shapes = {f"visual.{key}": tuple(value.shape) for key, value in visual.state_dict().items()}
    folder = place / f"{label(model)}-{blocks(visual)}-blocks"
    files = Files(
        folder / "base.safetensors",
        tuple(folder / f"expert-{task}.safetensors" for task in range(tasks)),
        tuple(folder / f"images-{task}-{proxies}.safetensors" for task in range(tasks)),
    )
    _once(files.base, lambda: {key: _pretrained(key, shape) for key, shape in shapes.items()})
    base = whole(files.base)
    for task, path in enumerate(files.experts):
        _once(path, partial(_expert, task, base))
    for task, path in enumerate(files.images):
        _once(path, partial(_images, task, (proxies, 3, *visual.image_size)))
    return files


def whole(path: str | Path) -> Weights:
    """Weights of a tower, read from a file as they are needed."""
    return cast(Weights, open_weights(path))


def _expert(task: int, base: Weights) -> Weights:
    return {key: base[key] + _task_vector(task, key, base[key]) for key in base}


def _images(task: int, shape: tuple[int, ...]) -> Weights:
    return {"images": torch.randn(shape, generator=_generator(f"images {task}"))}


def _once(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> None:
    if not path.exists():
        save_safetensors(path, make())


def _generator(name: str) -> torch.Generator:
    """A stream of random numbers of its own for every tensor: none depends on what was made before."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _pretrained(key: str, shape: tuple[int, ...]) -> Tensor:
    noise = torch.randn(shape, generator=_generator(key))
    if len(shape) > 1:
        fan_in = shape[0] if key.endswith(("proj", "embedding")) else noise[0].numel()
        return noise * float(fan_in**-0.5)
    return noise * 0.02 + (1.0 if ".ln_" in key and key.endswith("weight") else 0.0)


def _task_vector(task: int, key: str, base: Tensor) -> Tensor:
    own = _generator(f"{task} {key}")
    strength = CHANGE * (0.7 + 0.6 * torch.rand((), generator=own)) * base.std()
    if base.dim() != 2:
        return strength * torch.randn(base.shape, generator=own)
    shared, noise = _low_rank(base.shape, _generator(f"shared {key}")), torch.randn(base.shape, generator=own)
    return strength * (_low_rank(base.shape, own) + SHARED * shared + NOISE * noise)


def _low_rank(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A matrix of a quarter of the full rank, singular values falling like ``1 / sqrt(j)``, entries of variance 1."""
    rank = max(1, min(shape) // 4)
    spectrum = torch.arange(1.0, rank + 1).pow(-0.5)
    left, right = (torch.randn(side, rank, generator=generator) for side in shape)
    product: Tensor = (left * (spectrum / spectrum.norm())) @ right.T
    return product


@contextmanager
def quietly() -> Iterator[None]:
    """Keep open_clip's warning that the weights are random out of the way."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
