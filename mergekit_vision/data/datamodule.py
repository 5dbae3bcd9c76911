"""The data module: one exact loader a task, and the unlabelled proxy images."""

import os
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from mergekit_vision.errors import InputError
from mergekit_vision.files import digest
from mergekit_vision.pixels import (
    Batch,
    ExactSampler,
    PixelCache,
    PixelLoader,
    Preprocess,
    Untouched,
    decoding_processes,
    eval_transform,
)
from mergekit_vision.proxies import Proxies
from mergekit_vision.sources import (
    FlatFolder,
    ImageSource,
    closest,
    content_faults,
    is_fetched,
    open_source,
    resolve,
)
from mergekit_vision.suite import Suite
from mergekit_vision.suite_file import raise_faults

if TYPE_CHECKING:
    from mergekit_vision.encoder import Backbone


__all__ = ["Proxies", "VisionTasks"]

_DEFAULT_PROXIES = Proxies()

_EVALUATED = {"validate": "val", "test": "test"}


class VisionTasks(LightningDataModule):
    """Images of the tasks of a suite, preprocessed as its backbone asks.

    A loader of a split yields ``(images, labels)``: float32 ``[N, 3, H, W]`` and int64 ``[N]``, in the order of the data, on the
    trainer's device. Under several processes each gets its share, every image exactly once in all; a process may get none.

    Args:
        suite: the suite's YAML file.
        batch_size: images a batch.
        num_workers: processes that decode images, a loader; unless given, as many as the machine has cores to spare for it.
        proxies: which images a data-dependent merger sees.
        tasks: the tasks to evaluate (all by default); merging takes all experts of the suite in any case.
        cache_mb: memory in MiB for decoded and resized pixels, so that later passes over a split do not decode it again; a split
            that no longer fits is decoded anew each time. 0 for none. It is of a whole machine: its processes share it equally.

    Attributes:
        images: the unlabelled images that :meth:`predict_dataloader` yields.

    Raises:
        InputError: for a value out of range. The suite is read at first use.
    """

    def __init__(
        self,
        suite: str,
        batch_size: int = 128,
        num_workers: int | None = None,
        proxies: Proxies = _DEFAULT_PROXIES,
        tasks: list[str] | None = None,
        cache_mb: int = 2048,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("cache_mb", cache_mb, 0)):
            if value is not None and value < least:
                raise InputError(f"{name} must be {least} or more, not {value}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.proxies = proxies
        self.images: FlatFolder | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._suite_path = suite
        self._chosen = tasks
        self._cache_mb = cache_mb
        self._sources: dict[tuple[str, str], ImageSource] = {}
        self._checked: set[tuple[str, str]] = set()
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

    def check(
        self, splits: Collection[str] = (), experts: bool = True, proxies: bool = False, everywhere: Collection[str] = ()
    ) -> None:
        """Check the suite whole, before anything heavy; what was checked before is not checked again.

        The model calls it, since only the model knows what it is going to read.

        Args:
            splits: splits that every task of :attr:`task_names` must have.
            experts: whether the experts will be read.
            proxies: whether proxy images may be asked for; their split or source is then checked too. Tasks without the default
                split ``val`` are let pass, since many methods need no images; :meth:`proxy_loader` refuses them.
            everywhere: splits that every task of the suite must have.

        Raises:
            InputError: with every fault that headers show, one a line; then with those of the proxy images themselves.
        """
        chosen, suite = self.task_names, self.suite
        wanted = {task: {*everywhere, *(splits if task in chosen else ())} for task in suite.tasks}
        for task in self._proxy_tasks() if proxies and self.proxies.source is None else ():
            wanted[task].add(self.proxies.split)
        unchecked = {task: sorted(split for split in wanted[task] if (task, split) not in self._checked) for task in wanted}
        experts = experts and not self._experts_checked
        faults = self._header_faults(unchecked, experts)
        raise_faults(suite.path, faults + (self._proxy_faults() if proxies else []))
        self._checked |= {(task, split) for task, names in unchecked.items() for split in names}
        self._experts_checked |= experts
        if proxies:
            raise_faults(suite.path, self._draw_faults())

    def splits_needed(self, fn: str | None) -> set[str]:
        """Splits that one of Lightning's functions (``validate``, ``test``, …) evaluates."""
        return {_EVALUATED[fn]} if fn in _EVALUATED else set()

    def prepare_data(self) -> None:
        """Download what will be read from elsewhere, in one process of each machine before the others look for it.

        That is the evaluated split of the tasks to evaluate, and of all tasks what the model names as its ``extra_splits``.
        Nothing is downloaded for a suite that is at fault.
        """
        if self.trainer is None:
            return
        model, splits = self.trainer.lightning_module, self.splits_needed(self.trainer.state.fn)
        extra, merging = getattr(model, "extra_splits", set[str]()), getattr(model, "merger", None) is not None
        fetched = [
            (task.name, split)
            for task in self.suite.tasks.values()
            for split, config in task.data.items()
            if is_fetched(config) and (split in extra or (split in splits and task.name in self.task_names))
        ]
        elsewhere = merging and self.proxies.source is not None and is_fetched(self.proxies.source)
        if fetched or elsewhere:
            self.check(splits, experts=merging)
        for task, split in fetched:
            self._source(task, split)
        if elsewhere:
            self._elsewhere()

    def size(self, task: str, split: str) -> int:
        """Number of images of one split of one task."""
        return len(self._source(task, split))

    def fingerprint(self, task: str, split: str) -> str:
        """Hash of one split's images and labels, for caches by content."""
        return self._source(task, split).fingerprint()

    def proxy_fingerprint(self, task: str) -> str:
        """Hash of one task's proxy images; raises as :meth:`proxy_loader`."""
        source, indices = self._draw(task)
        return digest(source.fingerprint(), indices)

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

    @cached_property
    def _cache(self) -> PixelCache:
        """Of this process; made at first use, when the trainer is known."""
        return PixelCache((self._cache_mb << 20) // self._processes)

    @property
    def _processes(self) -> int:
        """How many of this run share the machine."""
        here = os.environ.get("LOCAL_WORLD_SIZE", "1")  # set by torchrun
        return max(1, int(here) if self.trainer is None else self.trainer.num_devices)

    @property
    def _device(self) -> torch.device:
        """The device of this process, on which batches are wanted."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _source(self, task: str, split: str) -> ImageSource:
        """One split, opened once. What had to be fetched first can only be checked now."""
        if (task, split) not in self._sources:
            path, known = self.suite.path, self.suite.tasks[task]
            if split not in known.data:
                raise InputError(
                    f"{path}: task {task} has no split {split}{closest(split, known.data)}; it has {', '.join(known.data)}"
                )
            source = open_source(known.data[split])
            if faults := content_faults(source, known.classes, known.named_by_data):
                raise InputError(f"{path}: tasks.{task}.data.{split}: {'; '.join(faults)}")
            self._sources[task, split] = source
        return self._sources[task, split]

    def _elsewhere(self) -> ImageSource:
        """The one out-of-domain source that all tasks' proxies are drawn from."""
        key = ("", "proxies")
        if key not in self._sources:
            assert self.proxies.source is not None
            config = resolve(self.proxies.source, self.suite.path.parent)
            self._sources[key] = open_source(config, labelled=self.proxies.label is not None)
        return self._sources[key]

    def _draw(self, task: str) -> tuple[ImageSource, list[int]]:
        own = self.proxies.source is None
        try:
            source = self._source(task, self.proxies.split) if own else self._elsewhere()
            return source, self.proxies.draw(source)
        except InputError as error:
            where = f"proxy images of task {task}" if own else "proxies.source"
            raise InputError(f"{where}: {error}") from error

    def _proxy_tasks(self) -> list[str]:
        """Tasks whose own split the proxies are drawn from and checked; without the default split they may need none."""
        split, tasks = self.proxies.split, self.suite.tasks
        having = [task for task in tasks if split in tasks[task].data]
        return having if split == _DEFAULT_PROXIES.split or not having else list(tasks)

    def _header_faults(self, splits: Mapping[str, Collection[str]], experts: bool) -> list[str]:
        return self.suite.faults(self._backbone.shapes, splits, experts) if experts or any(splits.values()) else []

    def _proxy_faults(self) -> list[str]:
        """Faults of where the proxies come from that concern no single task."""
        split, tasks = self.proxies.split, self.suite.tasks.values()
        if self.proxies.source is None:
            known = sorted({name for task in tasks for name in task.data})
            if split in known or split == _DEFAULT_PROXIES.split:
                return []
            return [f"proxies.split: no task has a split {split}{closest(split, known)}; they have {', '.join(known)}"]
        if is_fetched(self.proxies.source):
            return []  # not before everything else is known to be sound
        try:
            self._elsewhere()
        except InputError as error:
            return [f"proxies.source: {error}"]
        return []

    def _draw_faults(self) -> list[str]:
        """Faults of the proxy images themselves, which are drawn to see whether there are any."""
        faults = []
        for task in self._proxy_tasks() if self.proxies.source is None else list(self.suite.tasks)[:1]:
            try:
                self._draw(task)
            except InputError as error:
                faults.append(str(error))
        return faults

    def _place(self) -> tuple[int, int]:
        """Number of processes and this one's rank."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loader(
        self, source: Any, key: tuple[str | int, ...] | None, world: int = 1, rank: int = 0, images_only: bool = False
    ) -> "DataLoader[Any]":
        device, workers = self._device, self.num_workers
        if workers is None:
            workers = decoding_processes(len(source) // world, self.batch_size, self._processes, device.type != "cpu")
        return PixelLoader(
            source,
            self._preprocess,
            sampler=ExactSampler(source, world, rank) if world > 1 else None,
            batch_size=self.batch_size,
            num_workers=workers,
            device=device,
            images_only=images_only,
            cache=self._cache if key else PixelCache(0),
            key=key or (),
        )
