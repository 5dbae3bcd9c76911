"""Image data sets by class path, as torchvision's are."""

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.decoding import rgb
from mergekit_vision.support.faults import in_one_line
from mergekit_vision.support.files import WORK, draft_folder, move_into
from mergekit_vision.support.fingerprints import digest, stamps
from mergekit_vision.support.imports import import_by_path, registered
from mergekit_vision.support.memory import is_spent
from mergekit_vision.support.source_code import code_fingerprint

GROUP = "mergekit_vision.datasets"
"""Entry points of data set classes."""

_TORCHVISION, _OWN = "torchvision.datasets", "mergekit_vision.demo.tasks"
_UNPICKLING = {"LSUN", "LSUNClass"}
"""Data sets of torchvision that unpickle a file of the working directory, which may run code."""

_FOLDERS = ("_base_folder", "base_folder", "raw_folder", "_data_dir", "_data_path", "_size_root", "root")
"""Where one of torchvision's classes keeps its files or some of them: below ``root``, or relative to it."""

_MOST = 10**8  # images; the largest public sets of labeled ones have a few 10^7


class TorchvisionImages(ImageSource):
    """Any map-style data set class of ``(PIL image, class index)``, built from its class path and arguments."""

    def __init__(self, class_path: str, args: Mapping[str, Any], allow_code: bool = False) -> None:
        build = import_class(class_path, args, allow_code)
        self._where, self._args = class_path, dict(args)
        try:
            self._data = _built(build, class_path, args)
            self._length = len(self._data)
        except Exception as error:  # whatever its code raises where data is missing or arguments are wrong
            if is_spent(error):
                raise
            raise InputError(f"{class_path}: {in_one_line(error)}") from error
        if self._length > _MOST:
            raise InputError(f"{class_path}: has {self._length} images, and {_MOST} are the limit")
        # OxfordIIITPet's way of telling cats from dogs
        self._binary = getattr(self._data, "_target_types", None) == ["binary-category"]
        names = getattr(self._data, "bin_classes" if self._binary else "classes", None)
        self.names = tuple(map(_first_name, names)) if names is not None else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and class at ``index``."""
        try:
            image, label = self._data[index]
            return rgb(image), operator.index(label)
        except Exception as error:  # whatever the code of the data set raises
            if is_spent(error):
                raise
            raise InputError(
                f"{self._where}, item {index}: not a readable (PIL image, class index) pair ({in_one_line(error)})"
            ) from error

    def labels(self) -> Sequence[int]:
        """Class index of every image, decoded along with the images where the class keeps no list of them."""
        return self._labels

    def fingerprint(self) -> str:
        """Hash of the class, its arguments, all labels, and the paths, sizes and modification times under ``root``.

        Of a class of torchvision that has a folder of its own there, it is that folder's files: data sets may share a ``root``.
        Without a directory ``root`` among the arguments, the data set is taken for what its class always yields.
        """
        root = self._args.get("root")
        files = stamps(self._folder(Path(root))) if isinstance(root, str) else []
        code = None if self._where.startswith(f"{_TORCHVISION}.") else code_fingerprint([type(self._data)])
        return digest(self._where, code, sorted(self._args.items()), self.labels(), files)

    def _folder(self, root: Path) -> Path:
        """The folder in ``root`` with all files of a class of torchvision that names one, else ``root``."""
        if self._where.startswith(f"{_TORCHVISION}."):
            for own in (Path(str(getattr(self._data, attribute, ""))) for attribute in _FOLDERS):
                inside = own.relative_to(root) if own.is_relative_to(root) else own
                if inside.parts and not inside.is_absolute():
                    return root / inside.parts[0]
        return root

    @cached_property
    def _labels(self) -> Sequence[int]:
        for attribute in ("_bin_labels",) if self._binary else ("targets", "labels", "_labels"):
            known = getattr(self._data, attribute, None)
            if known is not None and len(known) == len(self):
                return [self._index(label, attribute) for label in known]
        samples = getattr(self._data, "_samples", None)  # (file, label) pairs, as GTSRB and StanfordCars keep them
        if samples is not None and len(samples) == len(self) and all(isinstance(pair[-1], int) for pair in samples):
            return [pair[-1] for pair in samples]
        return [self[index][1] for index in range(len(self))]

    def _index(self, label: Any, attribute: str) -> int:
        try:
            return operator.index(label)
        except TypeError as error:
            raise InputError(f"{self._where}: {attribute} holds {label!r}, which is no class index") from error


def _first_name(name: object) -> str:
    """A class's name, or the first where it has several, as in ImageNet."""
    return str(name[0] if isinstance(name, tuple) and name else name)


def _built(build: Callable[..., Any], class_path: str, args: Mapping[str, Any]) -> Any:
    """The data set. What torchvision downloads is put into its place once it is whole: of many classes it believes any files."""
    root = args.get("root")
    if not (class_path.startswith(f"{_TORCHVISION}.") and args.get("download") is True and isinstance(root, str)):
        return build(**args)
    here = {**args, "download": False}
    try:
        return build(**here)
    except (RuntimeError, OSError, ValueError, TypeError):
        with draft_folder(Path(root) / WORK) as draft:
            build(**{**args, "root": str(draft)})
            move_into(draft, Path(root))
        return build(**here)


def import_class(class_path: str, args: Mapping[str, Any], allow_code: bool = False) -> Callable[..., Any]:
    """A data set class, with arguments matched to its constructor, which is not called.

    A suite may be a stranger's. Without ``allow_code`` nothing is imported but torchvision's data sets, this package's own, and
    those that installed packages register as entry points in the group ``mergekit_vision.datasets``, by name or class path.

    Args:
        class_path: of the class.
        args: of its constructor.
        allow_code: whether any other class may be imported and called.

    Raises:
        InputError: when there is no such class, it is not allowed, it is no map-style data set, or these are not its arguments.
    """
    found = _known(class_path)
    if found is None and not allow_code:
        raise InputError(
            f"{class_path}: not a data set of torchvision or of an installed package, so it is not imported; give a class path "
            "like torchvision.datasets.MNIST, or, if you trust the suite and the class, allow_code (command line: --allow-code)"
        )
    if found is None:
        try:
            found = import_by_path(class_path)
        except InputError as error:
            raise InputError(f"{error}; give a class path like torchvision.datasets.MNIST") from error
    if not (isinstance(found, type) and hasattr(found, "__getitem__") and hasattr(found, "__len__")):
        raise InputError(f"{class_path}: not a class of map-style data sets, with __getitem__ and __len__")
    try:
        inspect.signature(found).bind(**args)
    except TypeError as error:
        raise InputError(f"{class_path}: {error} (`args` holds {', '.join(args) or 'nothing'})") from error
    build: Callable[..., Any] = found
    return build


def is_downloaded(class_path: str, args: Mapping[str, Any], allow_code: bool = False) -> bool:
    """Whether a data set class finds its data without a download, which is tried; ``False`` for what is no such class."""
    if args.get("root") is not None and not Path(str(args["root"])).is_dir():
        return False
    try:
        TorchvisionImages(class_path, {**args, **({"download": False} if "download" in args else {})}, allow_code)
    except InputError:
        return False
    return True


def _known(class_path: str) -> Any:
    """The class, where importing it runs no code but that of installed packages; ``None`` for any other."""
    module, _, name = class_path.rpartition(".")
    if module == _TORCHVISION:
        import torchvision.datasets

        known = name in torchvision.datasets.__all__ and name not in _UNPICKLING
        return getattr(torchvision.datasets, name) if known else None
    if module == _OWN:
        return import_by_path(class_path)
    return registered(GROUP, class_path)
