"""What a run on a suite would do, read and take, found out without downloading anything."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_vision.data.preprocess import Preprocess, eval_transform
from mergekit_vision.encoders.backbone import Backbone, describe_backbone
from mergekit_vision.encoders.presence import pretrained_place
from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merger
from mergekit_vision.merging.record import needs_images
from mergekit_vision.merging.speed import Clock, measure
from mergekit_vision.merging.work import Sizes
from mergekit_vision.runs.decoding import decoding_seconds
from mergekit_vision.runs.estimate import Images, estimate, parameters
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.hub import library_fault
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.checks import suite_faults
from mergekit_vision.suites.presence import Presence, expert_presence, known_images, source_presence
from mergekit_vision.suites.splits import TEST, VAL
from mergekit_vision.suites.suite import Suite, Task
from mergekit_vision.support.console import track
from mergekit_vision.support.hub import offline

_NUMBER = 4
"""Bytes of a weight in float32."""


@dataclass(frozen=True)
class Options:
    """How a run is made, as far as its cost depends on it.

    Attributes:
        proxies: images a task.
        batch_size: images a batch.
        cache_mb: memory in MiB for decoded pixels.
    """

    proxies: int = 32
    batch_size: int = 128
    cache_mb: int = 2048

    def __post_init__(self) -> None:
        for name, least in (("proxies", 1), ("batch_size", 1), ("cache_mb", 0)):
            if getattr(self, name) < least:
                raise InputError(f"`{name}` must be {least} or more, not {getattr(self, name)}", of="command")


class Planning:
    """Looks at a suite and at this machine, offline.

    Args:
        suite: the suite.
        mergers: name -> method.
        options: how they are run.
    """

    def __init__(self, suite: Suite, mergers: Mapping[str, Merger], options: Options) -> None:
        self._suite, self._mergers, self._options = suite, mergers, options
        self._backbone, self._unknown = _described(suite)
        self._size = None if self._backbone is None else _NUMBER * parameters(self._backbone)
        here, place = pretrained_place(suite.backbone, suite.pretrained)
        self._weights = Presence(here, self._size, place)
        tasks = suite.tasks.values()
        self._experts = {task.name: expert_presence(task.expert) for task in track(list(tasks), "looking for experts")}
        self._data = {task.name: _splits(suite, task) for task in track(list(tasks), "looking for data")}
        self._sources = {name: dict(self._opened(name, splits)) for name, splits in self._data.items()}

    def _opened(self, task: str, splits: Mapping[str, Presence]) -> Iterator[tuple[str, ImageSource]]:
        for split in (split for split, presence in splits.items() if presence.here):
            config: dict[str, Any] = dict(self._suite.tasks[task].data[split])
            if "download" in config.get("args", {}):
                config["args"] = {**config["args"], "download": False}
            try:
                with offline():
                    source = open_source(config, allow_code=self._suite.allow_code)
                yield split, source
            except InputError:  # a fault, which is found by the checks
                continue

    def faults(self) -> list[str]:
        """Everything that is wrong with the suite, as far as what is here tells; one text each."""
        away = self._suite.backbone.startswith("hf-hub:") and not self._weights.here
        found = [self._unknown] if self._unknown and not away else []
        needed = (TEST, VAL) if any(map(needs_images, self._mergers.values())) else (TEST,)
        wanted = {}
        for name, task in self._suite.tasks.items():
            here = [split for split, presence in self._data[name].items() if presence.here or not _from_hub(task.data[split])]
            wanted[name] = [*here, *(split for split in needed if split not in task.data)]
            if len(here) < len(task.data) and (fault := library_fault()) and fault not in found:
                found.append(fault)
        shapes = {} if self._backbone is None else self._backbone.shapes
        readable = [name for name, task in self._suite.tasks.items() if self._experts[name].here or task.expert.hub is None]
        experts, activation = ([], None) if self._backbone is None else (readable, self._backbone.activation)
        with offline():
            return found + suite_faults(self._suite, shapes, wanted, experts, activation)

    def content(self, clock: Clock | None = None) -> dict[str, Any]:
        """What ``plan.json`` holds.

        Args:
            clock: gives the seconds that count; those of the wall where ``None``.
        """
        suite, options = self._suite, self._options
        return {
            "kind": "plan",
            "schema": 1,
            "suite": suite.name,
            "file": str(suite.path),
            "backbone": {"name": suite.backbone, "pretrained": suite.pretrained, **self._weights._asdict()},
            "options": {"proxies": options.proxies, "batch_size": options.batch_size, "cache_mb": options.cache_mb},
            "tasks": {name: self._task(task) for name, task in suite.tasks.items()},
            "bytes": self._bytes(),
            "estimate": self._estimate(**({} if clock is None else {"clock": clock})),
            "faults": self.faults(),
        }

    def _task(self, task: Task) -> dict[str, Any]:
        return {
            "classes": list(task.classes),
            "templates": list(task.templates),
            "expert": {"source": str(task.expert), **self._experts[task.name]._asdict()},
            "data": {
                split: {"source": dict(source), "images": self._images(task, split), **self._data[task.name][split]._asdict()}
                for split, source in task.data.items()
            },
        }

    def _images(self, task: Task, split: str) -> int | None:
        """Images of a split: those that are here, else as they are published; ``None`` where that is not known either."""
        source = self._sources[task.name].get(split)
        return known_images(task.data[split]) if source is None else len(source)

    def _bytes(self) -> dict[str, Any]:
        """Bytes to download as far as they are known, of what they are not, and what will be stored in the end."""
        away = {"backbone": self._weights} | {str(task.expert): self._experts[name] for name, task in self._suite.tasks.items()}
        away |= {presence.place: presence for splits in self._data.values() for presence in splits.values()}
        away = {name: presence for name, presence in away.items() if not presence.here}
        known = sum(presence.bytes or 0 for presence in away.values())
        output = self._size or 0
        unknown = [name for name, presence in away.items() if presence.bytes is None]
        return {"download": known, "unknown": unknown, "output": output, "store": known + output}

    def _estimate(self, **clock: Clock) -> dict[str, Any] | None:
        if self._backbone is None:
            return None
        sizes = Sizes.of(self._backbone.shapes, len(self._suite.tasks), self._options.proxies)
        speed = measure(self._backbone, sizes, self._options.batch_size, **clock)
        preprocess = eval_transform(self._backbone.preprocess)
        numbers = {split: self._numbers(split) for split in (VAL, TEST)}
        decoding = {split: self._decoding(split, numbers[split], preprocess, **clock) for split in (VAL, TEST)}
        totals = {
            split: None if None in found.values() else sum(filter(None, found.values())) for split, found in numbers.items()
        }
        prompts = sum(len(task.classes) * len(task.templates) for task in self._suite.tasks.values())
        images = Images(totals[VAL], totals[TEST], decoding, prompts)
        cache = self._options.cache_mb << 20
        return estimate(self._mergers, self._backbone, sizes, images, speed, self._options.batch_size, cache)

    def _numbers(self, split: str) -> dict[str, int | None]:
        """Task -> images of a split."""
        return {name: self._images(task, split) if split in task.data else None for name, task in self._suite.tasks.items()}

    def _decoding(self, split: str, numbers: Mapping[str, int | None], preprocess: Preprocess, **clock: Clock) -> float:
        """Seconds to decode a split of all tasks once, by a few of its images where they are here."""
        away: float | None = None
        seconds = 0.0
        for name, number in numbers.items():
            source = self._sources[name].get(split)
            if source is None or not len(source):
                away = decoding_seconds(None, preprocess, **clock) if away is None else away
                seconds += (number or 0) * away
                continue
            try:
                seconds += (number or 0) * decoding_seconds(source, preprocess, **clock)
            except InputError:  # a damaged image, of which evaluation will tell
                continue
        return seconds


def _described(suite: Suite) -> tuple[Backbone | None, str]:
    """What is known of the backbone, or why nothing is."""
    try:
        with offline():
            return describe_backbone(suite.backbone, suite.pretrained), ""
    except InputError as error:
        return None, str(error)


def _splits(suite: Suite, task: Task) -> dict[str, Presence]:
    return {split: source_presence(source, suite.allow_code) for split, source in task.data.items()}


def _from_hub(source: Mapping[str, Any]) -> bool:
    return "hub" in source and not Path(source["hub"]).is_dir()


def _sum(numbers: Collection[int | None]) -> int | None:
    """The sum; ``None`` where one is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None
