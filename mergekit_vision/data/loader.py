"""From images to batches: preprocessing, exact sharding over processes, and a cache of decoded pixels."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from mergekit_vision.errors import InputError
from mergekit_vision.progress import say

Batch = tuple[Tensor, Tensor]
"""Pixels or images ``[N, 3, H, W]`` and labels, int64 ``[N]``."""

_MOST_WORKERS = 16


@dataclass(frozen=True)
class Preprocess:
    """open_clip's evaluation transform, cut in two where the data is smallest.

    One after the other, the two parts give bit by bit what the whole transform gives.

    Attributes:
        geometry: one PIL image -> its resized pixels, uint8 ``[3, H, W]``.
        mean: the model's mean of each channel, float32 ``[3, 1, 1]``.
        std: the deviation, likewise.
        white: what divides pixels into [0, 1]: 255. As a tensor, since CUDA multiplies by the rounded reciprocal of a number.
    """

    geometry: Callable[[Any], Tensor]
    mean: Tensor
    std: Tensor
    white: Tensor = field(default_factory=lambda: torch.tensor(255.0))

    def to(self, device: torch.device) -> "Preprocess":
        """The same with :meth:`finish` on a device."""
        return Preprocess(self.geometry, self.mean.to(device), self.std.to(device), self.white.to(device))

    def finish(self, pixels: Tensor) -> Tensor:
        """Normalised float32 images of uint8 pixels ``[…, 3, H, W]``, in new memory on the same device."""
        # torchvision's Normalize takes twice the passes over memory, and reads the deviation back from the device
        return pixels.to(torch.float32).div_(self.white).sub_(self.mean).div_(self.std)


def eval_transform(config: Mapping[str, Any]) -> Preprocess:
    """The evaluation transform of open_clip's ``preprocess_cfg``."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose, PILToTensor

    *geometry, _, normalize = image_transform_v2(PreprocessCfg(**config), is_train=False).transforms
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (normalize.mean, normalize.std))
    return Preprocess(Compose([*geometry, PILToTensor()]), mean, std)


@dataclass
class PixelCache:
    """Batches of whole passes over data, up to a total size.

    Attributes:
        limit: bytes of all passes together.
        passes: what a pass was over -> its batches, in order.
        used: bytes kept.
    """

    limit: int
    passes: dict[tuple[str | int, ...], list[Batch]] = field(default_factory=dict)
    used: int = 0
    _told: bool = False

    def keep(self, key: tuple[str | int, ...], batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on, and keep them once the pass is complete, if they fit."""
        kept: list[Batch] = []
        size = 0
        for batch in batches:
            size += batch[0].nbytes
            if self.used + size <= self.limit:
                kept.append(_own(batch))
            else:
                kept.clear()
            yield batch
        if key in self.passes:  # another pass was quicker
            return
        if self.used + size > self.limit:
            self._tell(key, size)
        elif kept:
            self.passes[key] = kept
            self.used += size

    def _tell(self, key: tuple[str | int, ...], size: int) -> None:
        """Say once that not everything is kept, unless nothing was to be."""
        if self.limit and not self._told:
            self._told = True
            what = " ".join(map(str, key[:2]))
            need, left = size / 2**20, (self.limit - self.used) / 2**20
            say(
                f"{what}: {need:.0f} MiB of pixels do not fit into the {left:.0f} MiB left of --data.cache_mb (of this process); "
                "what does not fit is decoded again on every pass"
            )


def _own(batch: Batch) -> Batch:
    """The batch outside of shared memory, of which machines have little, and every tensor of which holds a file open."""
    pixels, labels = (part.clone() if part.is_shared() else part for part in batch)  # type: ignore[no-untyped-call]
    return pixels, labels


class ExactSampler(DistributedSampler[Any]):
    """Every ``world``-th index from ``rank`` on: each index in exactly one process, none repeated to even out the shares.

    Lightning leaves a ``DistributedSampler`` in place. Its own ``UnrepeatedDistributedSampler`` does the same, but refuses data
    sets shorter than the number of processes.

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

    Workers send and the cache keeps pixels as uint8; each pass normalises them anew, on the device they are for. Where that is a
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
    ) -> None:
        pixels = _Pixels(source, preprocess.geometry)
        super().__init__(pixels, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=_collate)
        self.preprocess, self.device = preprocess.to(device), device
        self.images_only = images_only
        self.cache, self.key = cache, key

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
                raise batch
            yield batch


def decoding_processes(images: int, batch_size: int, processes: int, accelerated: bool) -> int:
    """How many worker processes pay off for one pass over some images.

    Args:
        images: how many are decoded.
        batch_size: a worker decodes whole batches.
        processes: that share the machine.
        accelerated: whether the model runs elsewhere than on the cores that decode.

    >>> decoding_processes(10_000, 128, processes=1, accelerated=False)
    0
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(_MOST_WORKERS, cores // processes - 1, images // (2 * batch_size))) if accelerated else 0


@dataclass(frozen=True)
class Untouched:
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
