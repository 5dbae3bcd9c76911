"""Opens a source by its mapping."""

from collections.abc import Mapping
from pathlib import Path

from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.config import SourceConfig, config_faults, kind_of
from mergekit_vision.sources.folder import FlatFolder, FolderImages, listed
from mergekit_vision.sources.part import PartOf


def open_source(config: SourceConfig, labeled: bool = True, allow_code: bool = False) -> ImageSource:
    """Open a source by its mapping.

    Args:
        config: the mapping, with absolute paths or paths relative to the working directory.
        labeled: whether the class indices are needed; ``False`` also opens a folder of images without class directories.
        allow_code: whether a data set class that no installed package registers may be imported and called.

    Raises:
        InputError: when the mapping is malformed, or what it names is missing or of another layout.
    """
    faults = config_faults(config)
    if faults:
        raise InputError(f"data source {dict(config)}: {'; '.join(faults)}" if isinstance(config, Mapping) else faults[0])
    try:
        whole = _opened(config, labeled, allow_code)
        return PartOf(whole, config["part"], config.get("cap", True)) if config.get("part") else whole
    except OSError as error:  # a name too long, no permission
        raise InputError(f"{config[kind_of(config)]}: cannot be read ({error.strerror or error})") from error


def _opened(config: SourceConfig, labeled: bool, allow_code: bool) -> ImageSource:
    kind = kind_of(config)
    columns = {key: config[key] for key in ("image", "label") if key in config}
    if kind == "parquet":
        from mergekit_vision.sources.parquet import ParquetImages

        return ParquetImages(config["parquet"], **columns)
    if kind == "hub":
        from mergekit_vision.sources.hub import HubImages

        return HubImages(config["hub"], config["split"], config.get("name"), config.get("revision"), **columns)
    if kind == "torchvision":
        from mergekit_vision.sources.class_path import TorchvisionImages

        return TorchvisionImages(config["torchvision"], config.get("args", {}), allow_code)
    directory = Path(config["folder"])
    if not labeled and directory.is_dir() and not any(entry.is_dir() for entry in listed(directory)):
        return FlatFolder(directory)
    return FolderImages(directory)
