"""Image data sets through the ``datasets`` library: on the Hugging Face hub, in its cache, or in a local directory."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import yaml
from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.decoding import decode, named_by_data
from mergekit_vision.support.faults import closest, in_one_line
from mergekit_vision.support.hub import offline, request_errors, without_retries

_Result = TypeVar("_Result")
_UNLOADABLE = (ValueError, RuntimeError, KeyError, TypeError, yaml.YAMLError)  # the last two for the head of a README.md
_COMMIT = re.compile("[0-9a-f]{40}")  # older versions of `datasets` have another hash there


class HubImages(ImageSource):
    """One split of a data set with an image column and a class column.

    Args:
        dataset: ``ORG/NAME`` on the hub, or a local directory in the hub's layout.
        split: name of the split.
        name: configuration of the data set, where it has several.
        revision: commit, tag or branch.
        image: name of the image column.
        label: name of the label column.

    Raises:
        InputError: when ``datasets`` is not installed, the data set cannot be loaded, or its columns do not fit.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        name: str | None = None,
        revision: str | None = None,
        image: str = "image",
        label: str = "label",
    ) -> None:
        datasets = _library()
        self._where, self._label = f"{dataset} [{split}]", label
        builder = _builder(datasets, dataset, name, revision)

        def read() -> Any:
            builder.download_and_prepare()
            return builder.as_dataset(split=split)

        data = _fetch(datasets, dataset, read)
        self.names = _class_names(data.features, image, label, self._where)
        # undecoded, so that a damaged image can be named
        self._data = data.cast_column(image, datasets.Image(decode=False)).select_columns([image, label])
        self._image = image
        self.commit = builder.hash if _COMMIT.fullmatch(str(builder.hash)) and not Path(dataset).is_dir() else None
        self._places = [*([Path(dataset)] if Path(dataset).is_dir() else []), *_caches(datasets)]

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and class at ``index``."""
        row, where = self._data[int(index)], f"{self._where}, row {index}"
        return decode(self._encoded(row[self._image] or {}, where), where), self._class(row[self._label], where)

    def _encoded(self, cell: Mapping[str, Any], where: str) -> bytes | Path:
        """The encoded image of one cell: its bytes, or the file it names in the data set's directory or the libraries' caches."""
        data: bytes | None = cell.get("bytes")
        if data is not None:
            return data
        if not cell.get("path"):
            raise InputError(f"{where}: has no image")
        return named_by_data(cell["path"], self._places, where)

    def labels(self) -> Sequence[int]:
        """Class index of every row; only the label column is read, once."""
        return self._labels

    def fingerprint(self) -> str:
        """Hash that ``datasets`` keeps of the data's origin and what was done to it."""
        return str(self._data._fingerprint)

    @cached_property
    def _labels(self) -> Sequence[int]:
        return [self._class(label, self._where) for label in self._data[self._label]]

    @staticmethod
    def _class(label: Any, where: str) -> int:
        if not isinstance(label, int):
            raise InputError(f"{where}: label {label!r} is no class index")
        return int(label)  # of two classes that are false and true, too


def hub_class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names by a data set's description, without fetching its images.

    Raises:
        InputError: when there is no such data set, configuration, split or column.
    """
    dataset, split = config["hub"], config["split"]
    datasets = _library()
    info = _builder(datasets, dataset, config.get("name"), config.get("revision")).info
    plain = split.split("[")[0]  # "train[:80%]" is a part of "train"
    if info.splits and plain not in info.splits:
        raise InputError(f"{dataset}: no split {plain!r}{closest(plain, info.splits)}; it has {', '.join(info.splits)}")
    if not info.features:
        return None
    return _class_names(info.features, config.get("image", "image"), config.get("label", "label"), dataset)


def prepared_files(config: Mapping[str, Any]) -> list[Path]:
    """The files in the cache of ``datasets`` that a split is read from without asking the hub; none where it is not there."""
    dataset, split = config["hub"], config["split"].split("[")[0]
    try:
        if not prepared_folder(dataset).is_dir():
            return []
        with offline():
            builder = _builder(_library(), dataset, config.get("name"), config.get("revision"))
    except InputError:
        return []
    return sorted(Path(builder.cache_dir).glob(f"*-{split}*.arrow"))


def download_bytes(config: Mapping[str, Any]) -> int | None:
    """Size of the files that a data set is downloaded as, by the hub; ``None`` where that cannot be told."""
    from huggingface_hub import HfApi

    builder = _builder(_library(), config["hub"], config.get("name"), config.get("revision"))
    files = [file for split in (getattr(builder.config, "data_files", None) or {}).values() for file in split]
    found = [match for file in files if (match := re.fullmatch(r"hf://datasets/[^@]+@([^/]+)/(.+)", str(file)))]
    if not found or len(found) < len(files):
        return None
    paths = [unquote(match[2]) for match in found]
    entries = HfApi().get_paths_info(config["hub"], paths, repo_type="dataset", revision=found[0][1])
    return sum(getattr(entry, "size", 0) for entry in entries)


def prepared_folder(dataset: str) -> Path:
    """Where ``datasets`` keeps what it makes of a data set's files.

    Raises:
        InputError: when it is not installed.
    """
    datasets = _library()
    *owner, name = dataset.split("/")
    return Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, datasets.naming.camelcase_to_snakecase(name)])


def forget_prepared(config: Mapping[str, Any]) -> None:
    """Remove what ``datasets`` made of a data set's files, so that it is made again."""
    builder = _builder(_library(), config["hub"], config.get("name"), config.get("revision"))
    shutil.rmtree(builder.cache_dir, ignore_errors=True)


def library_fault() -> str | None:
    """Why no data set of the hub can be read here, if that is so."""
    try:
        _library()
    except InputError as error:
        return str(error)
    return None


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("a `hub` data source needs the `datasets` library: pip install mergekit-vision[hub]") from error
    return datasets


def _builder(datasets: Any, dataset: str, name: str | None, revision: str | None) -> Any:
    """What knows a data set's description and where its files are.

    Raises:
        InputError: when it cannot be found; or, where only an earlier copy can be, when that is not of ``revision``.
    """
    builder = _fetch(datasets, dataset, lambda: datasets.load_dataset_builder(dataset, name=name, revision=revision))
    earlier = type(builder).__module__.startswith("datasets.packaged_modules.cache")  # without the hub it takes any revision
    if earlier and revision and builder.hash != _commit(dataset, revision):
        raise InputError(
            f"{dataset}: the hub cannot be reached, and the copy on this machine is not known to be of revision {revision!r} "
            f"(it is of commit {builder.hash}); load it once with access to the hub"
        )
    return builder


def _commit(dataset: str, revision: str) -> str:
    """The commit that a branch or tag stood for when the hub was last asked, or else ``revision`` itself."""
    from huggingface_hub import constants

    reference = Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}" / "refs" / revision
    return reference.read_text().strip() if reference.is_file() else revision


def _caches(datasets: Any) -> list[Path]:
    """Where the libraries keep what they download."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)]


def _fetch(datasets: Any, dataset: str, load: Callable[[], _Result]) -> _Result:
    try:
        with nullcontext() if Path(dataset).is_dir() else without_retries():
            return load()
    except ConnectionError as error:
        offline = "HF_HUB_OFFLINE is set" if _offline(datasets) else "the hub cannot be reached"
        problem = f"not on this machine, and {offline}; load it once with access to the hub"
        raise InputError(f"{dataset}: {problem} ({' '.join(str(error).split())})") from error
    except (*request_errors(), *_UNLOADABLE, datasets.exceptions.DatasetsError) as error:
        # that one says only that an error occurred
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ else error
        hidden = isinstance(error, datasets.exceptions.DatasetNotFoundError) and "Revision" not in str(error)
        remedy = "; if it is private, log in by `hf auth login` or set HF_TOKEN" if hidden else ""
        raise InputError(
            f"{dataset}: cannot be loaded by `datasets` ({type(cause).__name__}: {in_one_line(cause)}){remedy}"
        ) from error


def _offline(datasets: Any) -> bool:
    """Whether the user keeps the library from the network; versions name that differently."""
    return any(getattr(datasets.config, name, False) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))


def _class_names(features: Mapping[str, Any], image: str, label: str, where: str) -> tuple[str, ...] | None:
    missing = [column for column in (image, label) if column not in features]
    if missing:
        raise InputError(
            f"{where}: no column {' or '.join(map(repr, missing))} among {', '.join(features)}; "
            "name the columns by `image:` and `label:`"
        )
    if type(features[image]).__name__ != "Image":
        raise InputError(f"{where}: column {image!r} holds {features[image]}, not images")
    names = getattr(features[label], "names", None)
    return tuple(names) if names else None
