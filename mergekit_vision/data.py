"""The data module: one exact loader a task, and the unlabelled proxy images."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from mergekit_vision.errors import InputError
from mergekit_vision.pixels import (
    Batch,
    ExactSampler,
    PixelCache,
    PixelLoader,
    Preprocess,
    Untouched,
    eval_transform,
)
from mergekit_vision.sources import FlatFolder, ImageSource, closest, config_faults, kind_of, open_source, resolve
from mergekit_vision.suite import Suite

if TYPE_CHECKING:
    from mergekit_vision.encoder import Backbone


@dataclass(frozen=True)
class Proxies:
    """Which unlabelled images a data-dependent merger sees of each task.

    Attributes:
        n: number of images a task; all of them where the split has fewer.
        split: split of the suite they are drawn from.
        seed: of the draw, which is without replacement.
        label: draw from this class index alone.
        source: draw every task's images from this data source instead (out-of-domain), given as in a suite file; relative paths
            are relative to the suite.
    """

    n: int = 32
    split: str = "val"
    seed: int = 0
    label: int | None = None
    source: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"proxies.n must be 1 or more, not {self.n}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"proxies.seed must lie in 0 to 2**32 - 1, not {self.seed}")
        if self.label is not None and self.label < 0:
            raise InputError(f"proxies.label must be a class index, 0 or more, not {self.label}")
        if self.source is not None and (faults := config_faults(self.source)):
            raise InputError(f"proxies.source: {'; '.join(faults)}")

    def draw(self, source: ImageSource) -> list[int]:
        """Indices of the images in ``source``, in the order drawn.

        Raises:
            InputError: when the source has no image (of the class).
        """
        pool = np.arange(len(source))
        if self.label is not None:
            pool = np.flatnonzero(np.asarray(source.labels()) == self.label)
        if not len(pool):
            raise InputError("no proxy images" if self.label is None else f"proxies.label: no image has the label {self.label}")
        chosen = np.random.RandomState(self.seed).choice(len(pool), min(self.n, len(pool)), replace=False)
        return [int(index) for index in pool[chosen]]


_DEFAULT_PROXIES = Proxies()


class VisionTasks(LightningDataModule):
    """Images of the tasks of a suite, preprocessed as its backbone asks.

    A loader of a split yields ``(images, labels)``: float32 ``[N, 3, H, W]`` and int64 ``[N]``, in the order of the data. Under
    several processes each gets its share, every image exactly once in all; a process may get none.

    Args:
        suite: the suite's YAML file.
        batch_size: images a batch.
        num_workers: processes that decode images, a loader.
        proxies: which images a data-dependent merger sees.
        tasks: the tasks to evaluate (all by default); merging takes all experts of the suite in any case.
        cache_mb: memory in MiB for decoded and resized pixels, so that later passes over a split do not decode it again; a split
            that no longer fits is decoded anew each time. 0 for none.

    Attributes:
        images: the unlabelled images that :meth:`predict_dataloader` yields.

    Raises:
        InputError: for a value out of range. The suite is read at first use.
    """

    def __init__(
        self,
        suite: str,
        batch_size: int = 128,
        num_workers: int = 0,
        proxies: Proxies = _DEFAULT_PROXIES,
        tasks: list[str] | None = None,
        cache_mb: int = 2048,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("cache_mb", cache_mb, 0)):
            if value < least:
                raise InputError(f"{name} must be {least} or more, not {value}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.proxies = proxies
        self.images: FlatFolder | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._suite_path = suite
        self._chosen = tasks
        self._cache = PixelCache(cache_mb << 20)
        self._sources: dict[tuple[str, str], ImageSource] = {}
        self._checked: set[str] = set()
        self._experts_checked = False

    @cached_property
    def suite(self) -> Suite:
        """The suite, read at first use."""
        return Suite.load(Path(self._suite_path))

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks to evaluate, in the order of the suite."""
        if self._chosen is None:
            return tuple(self.suite.tasks)
        unknown = [name for name in self._chosen if name not in self.suite.tasks]
        if unknown or not self._chosen:
            wrong = ", ".join(f"{name}{closest(name, self.suite.tasks)}" for name in unknown) or "an empty list"
            raise InputError(f"tasks: not in the suite: {wrong}; it has {', '.join(self.suite.tasks)}")
        return tuple(name for name in self.suite.tasks if name in self._chosen)

    def check(self, splits: Collection[str] = (), experts: bool = True, proxies: bool = False) -> None:
        """Check the suite whole, before anything heavy; what was checked before is not checked again.

        The model calls it, since only the model knows what it is going to read.

        Args:
            splits: splits that every task must have.
            experts: whether the experts will be read.
            proxies: whether proxy images will be asked for; their split or source is then checked too.

        Raises:
            InputError: with every fault found.
        """
        _ = self.task_names
        wanted = {*splits, *([self.proxies.split] if proxies and self.proxies.source is None else [])}
        unchecked, experts = wanted - self._checked, experts and not self._experts_checked
        if unchecked or experts:
            self.suite.check(self._backbone.shapes, sorted(unchecked), experts)
            self._checked |= unchecked
            self._experts_checked |= experts
        if proxies:
            for task in self.suite.tasks:
                self._draw(task)

    def prepare_data(self) -> None:
        """Download what the suite takes from elsewhere, in one process before the others look for it."""
        for task in self.suite.tasks.values():
            for split, config in task.data.items():
                if split in {"val", "test", self.proxies.split} and kind_of(config) in {"hub", "torchvision"}:
                    self._source(task.name, split)

    def size(self, task: str, split: str) -> int:
        """Number of images of one split of one task."""
        return len(self._source(task, split))

    def fingerprint(self, task: str, split: str) -> str:
        """Hash of one split's images and labels, for caches by content."""
        return self._source(task, split).fingerprint()

    def loader(self, task: str, split: str) -> "DataLoader[Batch]":
        """Loader of this process's share of one split of one task."""
        world, rank = self._place()
        return self._loader(self._source(task, split), (task, split, world, rank), world, rank)

    def proxy_loader(self, task: str) -> "DataLoader[Tensor]":
        """Loader of one task's proxy images, without labels: float32 ``[N, 3, H, W]``, the whole set in every process.

        Raises:
            InputError: when there are none.
        """
        return self._loader(Subset(*self._draw(task)), ("proxies", task), images_only=True)

    def val_dataloader(self) -> "list[DataLoader[Batch]]":
        """Loaders of the split ``val``, one a task in the order of :attr:`task_names`."""
        return [self.loader(task, "val") for task in self.task_names]

    def test_dataloader(self) -> "list[DataLoader[Batch]]":
        """Loaders of the split ``test``, one a task in the order of :attr:`task_names`."""
        return [self.loader(task, "test") for task in self.task_names]

    def predict_dataloader(self) -> Untouched | list[Untouched]:
        """Loader of :attr:`images`: preprocessed float32 ``[N, 3, H, W]`` and the index of each among the folder's paths.

        No loader where there are no images: then Lightning's ``predict`` only sets the model up, which merges.
        """
        if self.images is None:
            return []
        return Untouched(self._loader(self.images, None, *self._place()))

    @cached_property
    def _backbone(self) -> "Backbone":
        from mergekit_vision.encoder import describe

        return describe(self.suite.backbone, self.suite.pretrained)

    @cached_property
    def _preprocess(self) -> Preprocess:
        return eval_transform(self._backbone.preprocess)

    def _source(self, task: str, split: str) -> ImageSource:
        if (task, split) not in self._sources:
            data = self.suite.tasks[task].data
            if split not in data:
                raise InputError(
                    f"{self.suite.path}: task {task} has no split {split}{closest(split, data)}; it has {', '.join(data)}"
                )
            self._sources[task, split] = open_source(data[split])
        return self._sources[task, split]

    def _draw(self, task: str) -> tuple[ImageSource, list[int]]:
        if self.proxies.source is None:
            source = self._source(task, self.proxies.split)
        else:
            key = ("", "proxies")  # one out-of-domain source for all tasks
            if key not in self._sources:
                config = resolve(self.proxies.source, self.suite.path.parent)
                self._sources[key] = open_source(config, labelled=self.proxies.label is not None)
            source = self._sources[key]
        try:
            return source, self.proxies.draw(source)
        except InputError as error:
            raise InputError(f"proxy images of task {task}: {error}") from error

    def _place(self) -> tuple[int, int]:
        """Number of processes and this one's rank."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loader(
        self, source: Any, key: tuple[str | int, ...] | None, world: int = 1, rank: int = 0, images_only: bool = False
    ) -> "DataLoader[Any]":
        return PixelLoader(
            source,
            self._preprocess,
            sampler=ExactSampler(source, world, rank) if world > 1 else None,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            images_only=images_only,
            cache=self._cache if key else PixelCache(0),
            key=key or (),
        )
