"""The data module: one exact loader a task, and the unlabeled proxy images."""

import copy
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from mergekit_vision.data.checks import Needs, SuiteChecks
from mergekit_vision.data.images import SuiteImages
from mergekit_vision.data.loader import ExactSampler, OpaqueLoader, PixelLoader, decoding_processes
from mergekit_vision.data.pixel_cache import Batch, PixelCache
from mergekit_vision.data.preprocess import Preprocess, eval_transform
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.encoders.backbone import Backbone, describe_backbone
from mergekit_vision.errors import InputError
from mergekit_vision.sources.config import is_fetched
from mergekit_vision.sources.folder import FlatFolder
from mergekit_vision.suites.splits import TEST, VAL
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.faults import closest, repeated
from mergekit_vision.support.fingerprints import digest

_DEFAULT_PROXIES = Proxies()


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
        allow_code: import and call classes that a suite or a merged model names, of data sets and routers, even if no installed
            package registers them. Only for files that you trust.

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
        allow_code: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least, most in (
            ("batch_size", batch_size, 1, 1 << 20),
            ("num_workers", num_workers, 0, 1 << 10),
            ("cache_mb", cache_mb, 0, 1 << 30),
        ):
            if value is not None and not least <= value <= most:
                raise InputError(f"`{name}` must lie in {least} to {most}, not {value}", of="data")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.proxies = proxies
        self._folder: FlatFolder | None = None
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._suite_path = suite
        self._chosen = tasks
        self._cache_mb = cache_mb
        self._allow_code = allow_code

    @cached_property
    def suite(self) -> Suite:
        """The suite, read at first use."""
        return Suite.load(self._suite_path, self._allow_code)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks to evaluate, in the order of the suite."""
        if self._chosen is None:
            return tuple(self.suite.tasks)
        unknown = [name for name in self._chosen if name not in self.suite.tasks]
        if unknown or not self._chosen:
            wrong = ", ".join(f"{name}{closest(name, self.suite.tasks)}" for name in unknown) or "an empty list"
            raise InputError(f"`tasks`: not in the suite: {wrong}; it has {', '.join(self.suite.tasks)}", of="data")
        if twice := repeated(self._chosen):
            raise InputError(f"`tasks`: {twice[0]} is named twice", of="data")
        return tuple(name for name in self.suite.tasks if name in self._chosen)

    def variant(self, proxies: Proxies, tasks: Sequence[str]) -> "VisionTasks":
        """The same suite with other proxy images and other tasks to evaluate; what was opened or decoded serves both."""
        other = copy.copy(self)
        other.proxies, other._chosen = proxies, list(tasks)
        other.__dict__ |= {"_images": self._images.with_proxies(proxies), "_cache": self._cache}
        other.__dict__.pop("_checks", None)
        return other

    def only(self, tasks: Collection[str]) -> "VisionTasks":
        """The same of a suite that has some of the tasks alone; nothing of the others is looked at."""
        other = copy.copy(self)
        kept = {name: task for name, task in self.suite.tasks.items() if name in tasks}
        other.__dict__["suite"], other._chosen = replace(self.suite, tasks=kept), None
        for name in ("_images", "_checks"):
            other.__dict__.pop(name, None)
        return other

    def check(self, needs: Needs) -> None:
        """Check that the suite has what a run needs, before anything heavy; the model says what that is.

        Raises:
            InputError: with every fault that headers show, one a line; then with those of the proxy images themselves.
        """
        self._checks(self.task_names, needs)

    def fetch(self, needs: Needs) -> None:
        """Download what a run reads from elsewhere; the model asks for it in one process of each machine.

        Nothing is downloaded for a suite that is at fault.

        Raises:
            InputError: as :meth:`check`, or when something cannot be fetched.
        """
        proxies = needs.proxies_of(self.suite.tasks) if self.proxies.source is None else []
        read = {(task, self.proxies.split) for task in proxies}
        read |= {(task, split) for task in self.suite.tasks for split in needs.everywhere}
        read |= {(task, split) for task in self.task_names for split in needs.evaluated}
        sources = {(task.name, split): config for task in self.suite.tasks.values() for split, config in task.data.items()}
        fetched = [place for place, config in sources.items() if place in read and is_fetched(config)]
        elsewhere = needs.proxies and self.proxies.source is not None and is_fetched(self.proxies.source)
        experts = needs.experts and any(task.expert.hub is not None for task in self.suite.tasks.values())
        # checking downloads the experts; the splits that are searched on are checked once they are there
        if fetched or elsewhere or experts:
            self.check(Needs(needs.evaluated, experts=needs.experts))
        for task, split in fetched:
            self._images.split(task, split)
        if elsewhere:
            self._images.elsewhere()

    def size(self, task: str, split: str) -> int:
        """Number of images of one split of one task."""
        return len(self._images.split(task, split))

    def stays_decoded(self, tasks: Sequence[str], split: str) -> bool:
        """Whether this process's share of a split of some tasks is kept decoded, or fits into what is left of ``cache_mb``."""
        world, rank = self._place()
        missing = [task for task in tasks if (task, split, world, rank) not in self._cache.passes]
        images = sum(len(range(rank, self.size(task, split), world)) for task in missing)
        size = self._backbone.preprocess["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return images * 3 * height * width <= self._cache.limit - self._cache.used

    def hub_sources(self, split: str) -> dict[str, dict[str, Any]]:
        """Of each task to evaluate whose split is a data set of the hub, what names it, and the ``commit`` once it was read."""
        sources = {name: self.suite.tasks[name].data[split] for name in self.task_names}
        commits = {name: self._images.commit(name, split) for name in sources}
        found = {name: {"commit": commits[name]} if commits[name] else {} for name in sources}
        return {name: {**config, **found[name]} for name, config in sources.items() if "hub" in config}

    def fingerprint(self, task: str, split: str) -> str:
        """Hash of one split's images and labels, for caches by content."""
        return self._images.split(task, split).fingerprint()

    def proxy_fingerprint(self, task: str) -> str:
        """Hash of one task's proxy images; raises as :meth:`proxy_loader`."""
        source, indices = self._images.proxy_images(task)
        return digest(source.fingerprint(), indices)

    def proxies_seen(self, task: str) -> dict[str, Any]:
        """How one task's proxy images are drawn, and a hash of their pixels, wherever they lie.

        Raises:
            InputError: as :meth:`proxy_loader`.
        """
        source, indices = self._images.proxy_images(task)
        images = (source[index][0] for index in indices)
        content = digest(*((image.size, sha256(image.tobytes()).hexdigest()) for image in images))
        return {"proxies": asdict(self.proxies), "images": content}

    def loader(self, task: str, split: str) -> "DataLoader[Batch]":
        """Loader of this process's share of one split of one task."""
        world, rank = self._place()
        return self._loader(self._images.split(task, split), (task, split, world, rank), world, rank)

    def proxy_loader(self, task: str) -> "DataLoader[Tensor]":
        """Loader of one task's proxy images, without labels: float32 ``[N, 3, H, W]``, the whole set in every process.

        Raises:
            InputError: when there are none.
        """
        of = task if self.proxies.source is None else "all tasks"  # which share the images of one source
        key = ("proxies", of, repr(self.proxies))
        return self._loader(Subset(*self._images.proxy_images(task)), key, images_only=True)

    def val_dataloader(self) -> "list[DataLoader[Batch]]":
        """Loaders of the split ``val``, one a task in the order of :attr:`task_names`."""
        return [self.loader(task, VAL) for task in self.task_names]

    def test_dataloader(self) -> "list[DataLoader[Batch]]":
        """Loaders of the split ``test``, one a task in the order of :attr:`task_names`."""
        return [self.loader(task, TEST) for task in self.task_names]

    def predict_on(self, folder: FlatFolder | None) -> None:
        """Say which images :meth:`predict_dataloader` yields; ``None`` for none."""
        self._folder = folder

    def predict_dataloader(self) -> OpaqueLoader | list[OpaqueLoader]:
        """Loader of a folder's images: preprocessed float32 ``[N, 3, H, W]`` and the index of each among its paths.

        No loader where there are no images: then Lightning's ``predict`` only sets the model up, which merges.
        """
        if self._folder is None:
            return []
        return OpaqueLoader(self._loader(self._folder, None, *self._place()))

    @cached_property
    def _images(self) -> SuiteImages:
        return SuiteImages(self.suite, self.proxies)

    @cached_property
    def _checks(self) -> SuiteChecks:
        return SuiteChecks(self._images, lambda: self._backbone)

    @cached_property
    def _backbone(self) -> Backbone:
        return describe_backbone(self.suite.backbone, self.suite.pretrained)

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
            processes=self._place()[0],
        )
