"""What a suite needs from elsewhere: its backbone, experts and data sets, each with what downloads and verifies it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_vision.checkpoints import ExpertSource, open_expert
from mergekit_vision.checkpoints.hub import HubFile, remote_bytes
from mergekit_vision.encoders.backbone import backbone_repository, load_clip, load_tokenizer
from mergekit_vision.encoders.huggingface import WEIGHTS
from mergekit_vision.errors import InputError
from mergekit_vision.sources.config import SourceConfig, kind_of
from mergekit_vision.sources.hub import download_bytes, forget_prepared, prepared_folder
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.presence import expert_presence, source_presence
from mergekit_vision.suites.suite import Suite, Task
from mergekit_vision.support.hub_cache import remove_damaged, repository_folder, whole_bytes


@dataclass(frozen=True)
class Needed:
    """Something that a suite needs and that may have to be downloaded.

    Attributes:
        name: what it is, and for which tasks.
        folder: directory in which it arrives; ``None`` where that is not known, or it is not downloaded at all.
        fetch: downloads what is missing of it, and opens it as a run does.
        here: tells whether it is on this machine, without asking anyone.
        size: asks how many bytes there are to download; ``None`` where nobody tells.
        started: tells how many of them are here already.
        repair: removes what is damaged of it; whether there was anything.
        unpacked: directory in which as much again is written.
    """

    name: str
    folder: Path | None
    fetch: Callable[[], object]
    here: Callable[[], bool] = lambda: False
    size: Callable[[], int | None] = lambda: None
    started: Callable[[], int] = lambda: 0
    repair: Callable[[], bool] = lambda: False
    unpacked: Path | None = None

    def get(self) -> None:
        """Download and verify it, and what turns out to be damaged once more.

        Raises:
            InputError: when it cannot be had.
        """
        for _ in range(2):
            failure = None
            try:
                self.fetch()
            except InputError as error:
                failure = error
            if not self.repair():  # what is here of it is whole
                break
            failure = failure or InputError("what arrived is not what the hub has, twice; try again, or over another network")
        if failure is not None:
            raise failure

    def space(self) -> Iterator[tuple[Path, int]]:
        """Bytes that it will take in directories, as far as that is known."""
        size = None
        if not self.here():
            with suppress(Exception):  # whatever it is, the download itself says what is wrong
                size = self.size()
        if size is not None and self.folder is not None:
            yield self.folder, max(0, size - self.started())
            if self.unpacked is not None:
                yield self.unpacked, size


def needed(suite: Suite, tasks: Sequence[str]) -> Iterator[Needed]:
    """What merging and evaluating some tasks of a suite reads, apart from what is a file of the user's own and is there."""
    yield from _backbone(suite)
    chosen = [suite.tasks[name] for name in tasks]
    experts: dict[ExpertSource, list[str]] = {}
    for task in chosen:
        experts.setdefault(task.expert, []).append(task.name)
    yield from (_expert(source, names) for source, names in experts.items() if source.hub is not None or source.missing)
    for named in _data_sets(chosen):
        kind = kind_of(named[0][1])
        local = kind in ("parquet", "folder") or (kind == "hub" and Path(named[0][1]["hub"]).is_dir())
        if not (local and all(source_presence(config).here for _, config in named)):
            yield (_local if local else _of_hub if kind == "hub" else _of_class)(named, suite.allow_code)


def _backbone(suite: Suite) -> Iterator[Needed]:
    name, pretrained = suite.backbone, suite.pretrained
    if name.startswith("local-dir:") or (pretrained and Path(pretrained).is_file()):
        return
    repository = backbone_repository(name, pretrained)
    folder = Path.home() / ".cache" / "clip" if repository is None else repository_folder(repository)  # as open_clip has it

    def fetch() -> None:
        load_clip(name, pretrained)
        load_tokenizer(name)

    if repository is None:
        yield Needed(f"backbone {name}", folder, fetch)
        return
    weights = HubFile(repository, inside=None if name.startswith("hf-hub:") else WEIGHTS)
    yield Needed(
        f"backbone {name}",
        folder,
        fetch,
        here=lambda: any(folder.glob("snapshots/*/*.safetensors")),
        size=lambda: remote_bytes(weights),
        repair=lambda: bool(remove_damaged(folder)),
    )


def _expert(source: ExpertSource, tasks: Sequence[str]) -> Needed:
    name, file = f"expert of {', '.join(tasks)}", source.hub
    if file is None:
        return Needed(name, None, lambda: open_expert(source))
    folder = repository_folder(file.repository)
    return Needed(
        name,
        folder,
        lambda: open_expert(source),
        here=lambda: expert_presence(source).here,
        size=lambda: expert_presence(source).bytes or remote_bytes(file),
        repair=lambda: bool(remove_damaged(folder)),
    )


_Named = Sequence[tuple[str, SourceConfig]]
"""Sources of one data set, each with the task that names it."""


def _data_sets(tasks: Sequence[Task]) -> list[_Named]:
    """The sources of some tasks by the data set that they are splits of."""
    sets: dict[str, list[tuple[str, SourceConfig]]] = {}
    for task in tasks:
        for config in task.data.values():
            root = config.get("args", {}).get("root")  # type: ignore[attr-defined]
            same = [config.get(key) for key in (kind_of(config), "name", "revision")]
            sets.setdefault(repr((kind_of(config), same, root)), []).append((task.name, config))
    return list(sets.values())


def _name(named: _Named) -> str:
    first = named[0][1]
    return f"data of {', '.join(dict.fromkeys(task for task, _ in named))} ({first[kind_of(first)]})"


def _local(named: _Named, allow_code: bool) -> Needed:
    return Needed(_name(named), None, lambda: [open_source(config, allow_code=allow_code) for _, config in named])


def _of_hub(named: _Named, _: bool) -> Needed:
    first = named[0][1]
    folder = repository_folder(first["hub"], "dataset")

    def repair() -> bool:
        damaged = bool(remove_damaged(folder))
        if damaged:
            forget_prepared(first)
        return damaged

    return Needed(
        _name(named),
        folder,
        lambda: [open_source(config) for _, config in named],
        here=lambda: all(source_presence(config).here for _, config in named),
        size=lambda: download_bytes(first),
        started=lambda: whole_bytes(folder),
        repair=repair,
        unpacked=prepared_folder(first["hub"]),
    )


def _of_class(named: _Named, allow_code: bool) -> Needed:
    args: Mapping[str, Any] = named[0][1].get("args", {})
    return Needed(
        _name(named),
        Path(args["root"]) if isinstance(args.get("root"), str) else None,
        lambda: [open_source(config, allow_code=allow_code) for _, config in named],
        here=lambda: all(source_presence(config, allow_code).here for _, config in named),
    )
