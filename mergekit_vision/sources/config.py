"""Labelled image sources by a small mapping: Parquet files, the Hugging Face hub, an image folder, a torchvision data set.

======================================================  ===================================================================
mapping                                                 images
======================================================  ===================================================================
``{parquet: FILE_OR_GLOB}``                             local Parquet in the Hugging Face image schema
``{hub: ORG/NAME, split: S, name: N, revision: R}``     a data set on the hub or a local copy of one (extra ``hub``)
``{folder: DIRECTORY}``                                 one sub-directory a class, in alphabetical order
``{torchvision: CLASS_PATH, args: {…}}``                any map-style data set class yielding (PIL image, class index)
======================================================  ===================================================================

``parquet`` and ``hub`` take the column names ``image:`` and ``label:`` where they differ from those.
"""

import difflib
import io
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from mergekit_vision.errors import InputError
from mergekit_vision.files import digest, stamp

SourceConfig = Mapping[str, Any]
"""One source as it stands in a suite file; the module's text lists the kinds."""

_KEYS: dict[str, dict[str, type]] = {
    "parquet": {"parquet": str, "image": str, "label": str},
    "hub": {"hub": str, "split": str, "name": str, "revision": str, "image": str, "label": str},
    "folder": {"folder": str},
    "torchvision": {"torchvision": str, "args": dict},
}


class ImageSource(Dataset[tuple[Image.Image, int]], ABC):
    """A map-style data set of ``(RGB image, class index)``.

    Attributes:
        names: class names where the data knows them, else ``None``.
    """

    names: tuple[str, ...] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """One image and its class; raises :class:`InputError` naming the file and row where the image is damaged."""

    @abstractmethod
    def labels(self) -> Sequence[int]:
        """Class index of every image; no image is decoded."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash that changes when the images or labels do."""

    def label_range(self) -> tuple[int, int] | None:
        """Smallest and largest class index, as cheaply as the format allows; ``None`` where there are no images."""
        labels = self.labels()
        return (int(min(labels)), int(max(labels))) if len(labels) else None


def decode(image: bytes | Path, where: str) -> Image.Image:
    """Decode an encoded image to RGB.

    Raises:
        InputError: naming ``where`` (file and row), when the image is damaged or of an unknown format.
    """
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
            rgb: Image.Image = opened.convert("RGB")
            return rgb
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: not a readable image ({error}); replace or remove it") from error


def closest(word: str, known: Collection[str]) -> str:
    """Hint for a misspelt word: ``" (did you mean `parquet`?)"``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def kind_of(config: SourceConfig) -> str:
    """The kind of a well-formed source: ``parquet``, ``hub``, ``folder`` or ``torchvision``."""
    return next(kind for kind in _KEYS if kind in config)


def is_fetched(config: SourceConfig) -> bool:
    """Whether a well-formed source may be downloaded when it is opened."""
    return kind_of(config) in {"hub", "torchvision"}


def config_faults(config: object) -> list[str]:
    """What is wrong with the layout of a source's mapping, one text a fault.

    >>> config_faults({"parqet": "a.parquet"})
    ['unknown key `parqet` (did you mean `parquet`?); a source is one of parquet, hub, folder, torchvision']
    """
    if not isinstance(config, Mapping):
        return [f"must be a mapping such as `parquet: FILE`, not {config!r}"]
    kinds = [kind for kind in _KEYS if kind in config]
    if not kinds:
        hints = [f"unknown key `{key}`{closest(str(key), _KEYS)}" for key in config] or ["is empty"]
        return [f"{'; '.join(hints)}; a source is one of {', '.join(_KEYS)}"]
    if len(kinds) > 1:
        return [f"names more than one source: {', '.join(kinds)}; keep one"]
    known = _KEYS[kinds[0]]
    faults = [
        f"unknown key `{key}`{closest(str(key), known)}; known are {', '.join(known)}" for key in config if key not in known
    ]
    for key in config:
        if key in known and (not isinstance(config[key], known[key]) or config[key] == ""):
            faults.append(f"`{key}` must be a {'text' if known[key] is str else 'mapping'}, not {config[key]!r}")
    if kinds[0] == "hub" and "split" not in config:
        faults.append("`split` is missing; name the hub data set's split, such as `split: test`")
    return faults


def resolve(config: SourceConfig, root: Path) -> dict[str, Any]:
    """The same source with relative paths made absolute from ``root`` (a hub id only where it is a directory there)."""
    resolved = dict(config)
    for key in ("parquet", "folder"):
        if key in resolved:
            resolved[key] = str(root / Path(resolved[key]).expanduser())
    if "hub" in resolved and (root / resolved["hub"]).is_dir():
        resolved["hub"] = str(root / resolved["hub"])
    if isinstance(resolved.get("args"), Mapping) and isinstance(resolved["args"].get("root"), str):
        resolved["args"] = {**resolved["args"], "root": str(root / Path(resolved["args"]["root"]).expanduser())}
    return resolved


def open_source(config: SourceConfig, labelled: bool = True) -> ImageSource:
    """Open a source by its mapping.

    Args:
        config: the mapping, with absolute paths or paths relative to the working directory.
        labelled: whether the class indices are needed; ``False`` also opens a folder of images without class directories.

    Raises:
        InputError: when the mapping is malformed, or what it names is missing or of another layout.
    """
    faults = config_faults(config)
    if faults:
        raise InputError(f"data source {dict(config)}: {'; '.join(faults)}" if isinstance(config, Mapping) else faults[0])
    kind = kind_of(config)
    columns = {key: config[key] for key in ("image", "label") if key in config}
    if kind == "parquet":
        from mergekit_vision.parquet import ParquetImages

        return ParquetImages(config["parquet"], **columns)
    if kind == "hub":
        from mergekit_vision.hub import HubImages

        return HubImages(config["hub"], config["split"], config.get("name"), config.get("revision"), **columns)
    if kind == "torchvision":
        from mergekit_vision.torchvision_data import TorchvisionImages

        return TorchvisionImages(config["torchvision"], config.get("args", {}))
    directory = Path(config["folder"])
    if not labelled and directory.is_dir() and not any(entry.is_dir() for entry in directory.iterdir()):
        return FlatFolder(directory)
    return FolderImages(directory)


def check_source(config: SourceConfig, classes: Sequence[str], exact: bool = False) -> list[str]:
    """Faults of a well-formed source against the classes of its task; reads headers and label columns, never an image.

    The names that the data gives its classes may differ from those used in prompts, but a name that both use must stand for the
    same class index: a split whose classes are counted otherwise would be evaluated with wrong labels.

    Args:
        config: the source.
        classes: name of each class index.
        exact: whether the data must name its classes so too: the names come from another split.

    A torchvision class is only imported and its arguments matched; of a hub data set only the description is fetched. For both
    :func:`content_faults` tells the rest once they are opened.
    """
    kind = kind_of(config)
    try:
        if kind == "torchvision":
            from mergekit_vision.torchvision_data import import_class

            import_class(config["torchvision"], config.get("args", {}))
            return []
        if kind == "hub":
            return _name_faults(class_names(config), classes, exact)
        return content_faults(open_source(config), classes, exact)
    except InputError as error:
        return [str(error)]


def content_faults(source: ImageSource, classes: Sequence[str], exact: bool = False) -> list[str]:
    """Faults of an open source's class names and labels; arguments as of :func:`check_source`.

    Raises:
        InputError: when the labels cannot be read.
    """
    if faults := _name_faults(source.names, classes, exact):
        return faults
    labels = source.label_range()
    if labels is None:
        return ["holds no images"]
    if not 0 <= labels[0] <= labels[1] < len(classes):
        known = f"with {len(classes)} classes they must lie in 0 to {len(classes) - 1}"
        return [f"labels run from {labels[0]} to {labels[1]}, but {known}"]
    return []


def _name_faults(names: Sequence[str] | None, classes: Sequence[str], exact: bool) -> list[str]:
    """What is wrong with the names that the data gives its classes.

    >>> _name_faults(["circle", "ring"], ["ring", "circle"], exact=False)
    ['class 0 is `circle` in the data, but `ring` under `classes`; list them in the order of the data']
    """
    theirs = "in the task's first split" if exact else "under `classes`"
    if names is None or list(names) == list(classes):
        return []
    missing = [f"`{name}`" for name in classes if name not in names] if exact or set(names) & set(classes) else []
    lacking = f"; {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} missing here" if missing else ""
    if len(names) != len(classes):
        return [f"the data has {len(names)} classes, but there are {len(classes)} {theirs}{lacking}"]
    shared = [name for name in names if list(names).count(name) == list(classes).count(name) == 1]
    moved = [i for i, name in enumerate(names) if name != classes[i] and (exact or name in shared or classes[i] in shared)]
    if not moved:
        return []
    remedy = "name them alike in all splits" if exact else "list them in the order of the data"
    return [f"class {moved[0]} is `{names[moved[0]]}` in the data, but `{classes[moved[0]]}` {theirs}{lacking}; {remedy}"]


def class_names(config: SourceConfig) -> tuple[str, ...] | None:
    """Class names that a well-formed source knows, or ``None``; of a hub data set only the description is fetched.

    Raises:
        InputError: when the source cannot be opened.
    """
    if kind_of(config) == "hub":
        from mergekit_vision.hub import describe_hub

        return describe_hub(config)
    return open_source(config).names


class FolderImages(ImageSource):
    """A directory with one sub-directory of images a class; classes in alphabetical order, as torchvision's ``ImageFolder``."""

    def __init__(self, directory: str | Path) -> None:
        from torchvision.datasets import ImageFolder

        try:
            folder = ImageFolder(str(directory))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{directory}: not an image folder with one sub-directory a class ({error})") from error
        self.names = tuple(folder.classes)
        self._samples: list[tuple[str, int]] = folder.samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and class at ``index``, in the order of the sorted paths."""
        path, label = self._samples[index]
        return decode(Path(path), path), label

    def labels(self) -> Sequence[int]:
        """Class index of every image."""
        return [label for _, label in self._samples]

    def fingerprint(self) -> str:
        """Hash of the paths, sizes and modification times."""
        return digest(*(stamp(Path(path)) for path, _ in self._samples))


class FlatFolder(ImageSource):
    """Unlabelled images: the files of one directory in order of their names, or a single file.

    An item is ``(RGB image, index)``, so that a batch says which of :attr:`paths` it holds.

    Attributes:
        paths: the files, by index.
    """

    def __init__(self, directory: str | Path) -> None:
        place = Path(directory)
        if not place.exists():
            raise InputError(f"{place}: no such file or directory")
        suffixes = Image.registered_extensions()
        entries = sorted(place.iterdir()) if place.is_dir() else [place]
        self.paths = tuple(entry for entry in entries if entry.suffix.lower() in suffixes and entry.is_file())
        if not self.paths:
            raise InputError(f"{place}: holds no image files (known by suffixes such as .jpg, .png, .webp)")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image at ``index``, and ``index``."""
        return decode(self.paths[index], str(self.paths[index])), index

    def labels(self) -> Sequence[int]:
        """The indices."""
        return range(len(self.paths))

    def fingerprint(self) -> str:
        """Hash of the paths, sizes and modification times."""
        return digest(*map(stamp, self.paths))
