"""Loaders of preprocessed images, and their exact sharding over processes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from mergekit_vision.data.pixel_cache import Batch, PixelCache
from mergekit_vision.data.preprocess import Preprocess
from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.support.hardware import usable_cores

_MOST_WORKERS = 16
_LOST = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: (?P<signal>[^.]+)|exited unexpectedly)")


class ExactSampler(DistributedSampler[Any]):
    """Every ``world``-th index from ``rank`` on: each index in exactly one process, none repeated to even out the shares.

    Lightning leaves a ``DistributedSampler`` in place. Its own ``UnrepeatedDistributedSampler`` does the same, but refuses data
    sets shorter than the number of processes.

    >>> from mergekit_vision.data.loader import ExactSampler
    >>> [list(ExactSampler(range(5), 3, rank)) for rank in range(3)]
    [[0, 3], [1, 4], [2]]
    """

    def __init__(self, dataset: Any, world: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=False)
        self.num_samples = len(range(rank, len(dataset), world))
        self.total_size = len(dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class PixelLoader(DataLoader[Any]):
    """Loader of preprocessed images and labels, in order; a second pass comes from the cache.

    Workers send and the cache keeps pixels as uint8; each pass normalizes them anew, on the device they are for. Where that is a
    GPU, copies come from pinned memory and nothing waits for them.

    Args:
        source: map-style, of (PIL image, class index).
        preprocess: of the backbone.
        sampler: which of the images; all in order by default.
        batch_size: images a batch.
        num_workers: processes that decode. They end with the pass: the next one comes from the cache.
        device: where the batches are wanted.
        images_only: yield images ``[N, 3, H, W]`` alone instead of ``(images, labels)``.
        cache: where a complete pass is kept.
        key: names this data, sampler included, in the cache.
        processes: of the run. The others may be able to read an image that is damaged for this one, and then all must end: the
            error is an ``EvaluationError``.
    """

    def __init__(
        self,
        source: Any,
        preprocess: Preprocess,
        *,
        sampler: Sampler[int] | None,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        images_only: bool,
        cache: PixelCache,
        key: tuple[str | int, ...],
        processes: int = 1,
    ) -> None:
        pixels = _Pixels(source, preprocess.geometry)
        super().__init__(pixels, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=_collate)
        self.preprocess, self.device = preprocess.to(device), device
        self.images_only = images_only
        self.cache, self.key = cache, key
        self._error = InputError if processes == 1 else EvaluationError
        self._place = ""  # in messages
        if isinstance(sampler, ExactSampler):
            self._place = f" (on process {sampler.rank} of {sampler.num_replicas})"

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = self.cache.passes.get(self.key) or self.cache.keep(self.key, self._decoded())
        for batch in batches:
            pixels, labels = map(self._moved, batch)
            images = self.preprocess.finish(pixels)
            yield images if self.images_only else (images, labels.clone())

    def _moved(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":  # pinned here, not by the loader, which would pin what the cache keeps
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _decoded(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise self._error(f"{batch}{self._place}")
            yield batch


def decoding_processes(images: int, batch_size: int, processes: int, accelerated: bool) -> int:
    """How many worker processes pay off for one pass over some images.

    Args:
        images: how many are decoded.
        batch_size: a worker decodes whole batches.
        processes: that share the machine.
        accelerated: whether the model runs elsewhere than on the cores that decode.

    >>> from mergekit_vision.data.loader import decoding_processes
    >>> decoding_processes(10_000, 128, processes=1, accelerated=False)
    0
    """
    return max(0, min(_MOST_WORKERS, usable_cores() // processes - 1, images // (2 * batch_size))) if accelerated else 0


@contextmanager
def explained_workers() -> Iterator[None]:
    """Say in one line that a worker was lost, which torch raises in the main process wherever that is just then.

    Raises:
        InputError: when a worker was killed, or ended by itself.
    """
    try:
        yield
    except RuntimeError as error:
        if not (found := _LOST.search(f"{error.__cause__} {error}")):  # the cause has the signal
            raise
        how = f"was ended by the system ({found['signal']})" if found["signal"] else "ended without a message"
        short = "shared memory (/dev/shm)" if found["signal"] == "Bus error" else "memory"
        problem = f"a process that decodes images {how}, as happens when {short} runs out"
        remedy = "run fewer of them (`num_workers`; with 0, the main process decodes), or take smaller batches (`batch_size`)"
        raise InputError(f"{problem}; {remedy}", of="data") from error


@dataclass(frozen=True)
class OpaqueLoader:
    """A loader that Lightning takes as it is: in prediction it builds every ``DataLoader`` again, with a sampler of its own."""

    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class _Pixels(Dataset[Any]):
    """Pixels (uint8) and label of each item of a source; a damaged image comes out as the error that says so.

    Raised in a worker, the error would reach the user wrapped in the worker's traceback.

    Args:
        source: map-style, of (PIL image, class index).
        geometry: one PIL image -> its pixels.
    """

    def __init__(self, source: Any, geometry: Callable[[Any], Tensor]) -> None:
        self._source, self._geometry = source, geometry

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | InputError:
        try:
            image, label = self._source[index]
        except InputError as error:
            return error
        return self._geometry(image), label


def _collate(items: list[Any]) -> Any:
    """A batch of the items of :class:`_Pixels`, or the first error among them."""
    damaged = next((item for item in items if isinstance(item, InputError)), None)
    return damaged or tuple(default_collate(items))
