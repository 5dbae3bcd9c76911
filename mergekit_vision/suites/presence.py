"""What of a suite is on this machine, and where; the hub is not asked."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mergekit_vision.checkpoints import ExpertSource
from mergekit_vision.checkpoints.hub import cached_snapshot, named_shards
from mergekit_vision.checkpoints.opening import weights_file
from mergekit_vision.errors import InputError
from mergekit_vision.sources.class_path import is_downloaded
from mergekit_vision.sources.config import SourceConfig, kind_of
from mergekit_vision.sources.footer import matching
from mergekit_vision.sources.hub import prepared_files
from mergekit_vision.sources.part import val_size
from mergekit_vision.suites.catalog import expert_bytes, published_images


class Presence(NamedTuple):
    """Whether an expert or a split of data is on this machine.

    Attributes:
        here: whether a run can read it without downloading anything.
        bytes: of its files where it is here, else to be downloaded; ``None`` where unknown.
        place: file or directory where it is here or ought to be, else its address.
    """

    here: bool
    bytes: int | None
    place: str


def expert_presence(source: ExpertSource) -> Presence:
    """Whether an expert's weights are here: by the names of files alone, which may hold something else.

    Args:
        source: the expert; of one on the hub, the revision that was last downloaded counts.
    """
    if source.hub is None:
        found = _weights(source.path) if source.path is not None else []
        return Presence(bool(found), _size(found) if found else None, str(source.path))
    place = cached_snapshot(source.hub)
    found = [] if place is None else _weights(place)
    if not found:
        return Presence(False, expert_bytes().get(str(source.hub)), str(source.hub))
    return Presence(True, _size(found), str(place))


def source_presence(config: SourceConfig, allow_code: bool = False) -> Presence:
    """Whether a split of data is here.

    Args:
        config: the source, well-formed, with absolute paths.
        allow_code: as of :func:`~mergekit_vision.sources.opening.open_source`.
    """
    kind = kind_of(config)
    place = str(config[kind])
    if kind == "torchvision":
        args = config.get("args", {})
        return Presence(is_downloaded(place, args, allow_code), None, str(args.get("root", place)))
    if kind == "parquet":
        files = _matching(Path(place))
    elif kind == "hub" and not Path(place).is_dir():
        files = prepared_files(config)
        return Presence(bool(files), _size(files) if files else None, str(files[0].parent) if files else place)
    else:
        files = _files(Path(place))
    return Presence(bool(files), _size(files) if files else None, place)


def known_images(config: SourceConfig) -> int | None:
    """Number of images of a source as published suites have it; ``None`` where they do not have it.

    >>> known_images({"hub": "tanganke/sun397", "split": "train", "part": "val"})
    1985
    """
    images = published_images(config)
    if images is None or config.get("part") is None:
        return images
    held_out = val_size(images, config.get("cap", True))
    return held_out if config["part"] == "val" else images - held_out


def _weights(place: Path) -> list[Path]:
    """The files that hold the weights in a file or directory; none where one that an index names is missing."""
    try:
        file = weights_file(place)
    except InputError:
        return []
    shards = [file.parent / shard for shard in sorted(named_shards(file))]
    files = shards if file.suffix == ".json" else [file]
    return files if all(map(Path.is_file, files)) else []


def _matching(pattern: Path) -> list[Path]:
    try:
        return matching(pattern)
    except InputError:
        return []


def _files(directory: Path) -> list[Path]:
    return [file for file in directory.rglob("*") if file.is_file()] if directory.is_dir() else []


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
