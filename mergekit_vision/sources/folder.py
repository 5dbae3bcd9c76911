"""Directories of images."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.decoding import decode, suffixes
from mergekit_vision.support.console import logger
from mergekit_vision.support.fingerprints import digest, stamp


class FolderImages(ImageSource):
    """A directory with one sub-directory of images a class, classes and images in the order of torchvision's ``ImageFolder``.

    Links are followed. Hidden files and directories are left out, and files without an image's suffix, which are counted in a
    message.

    Raises:
        InputError: when there is no class, one has no image, or a directory cannot be read or is linked into itself.
    """

    def __init__(self, directory: str | Path) -> None:
        place = Path(directory)
        if not place.is_dir():
            raise InputError(f"{place}: not an image folder with one sub-directory a class (no such directory)")
        classes = [entry for entry in listed(place) if entry.is_dir()]
        if not classes:
            raise InputError(f"{place}: not an image folder with one sub-directory a class (it has no sub-directory)")
        self.names = tuple(entry.name for entry in classes)
        self._samples: list[tuple[str, int]] = []
        for label, entry in enumerate(classes):
            self._samples += [(path, label) for path in _images_below(entry.path)]

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
    """Unlabeled images: the files of one directory in order of their names, or a single file.

    An item is ``(RGB image, index)``, so that a batch says which of :attr:`paths` it holds.

    Attributes:
        paths: the files, by index.
    """

    def __init__(self, directory: str | Path) -> None:
        place = Path(directory)
        if not place.exists():
            raise InputError(f"{place}: no such file or directory")
        entries = [Path(entry) for entry in listed(place)] if place.is_dir() else [place]
        self.paths = tuple(entry for entry in entries if entry.suffix.lower() in suffixes() and entry.is_file())
        if not self.paths:
            below = "; sub-directories are not searched" if any(entry.is_dir() for entry in entries) else ""
            raise InputError(f"{place}: holds no image files (known by suffixes such as .jpg, .png, .webp){below}")

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


def listed(directory: str | Path) -> list["os.DirEntry[str]"]:
    """What a directory holds, in order of the names, without what is hidden.

    Raises:
        InputError: when it cannot be read.
    """
    try:
        with os.scandir(directory) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{directory}: cannot be read ({error.strerror}); give permission or remove it") from error


def _images_below(directory: str) -> list[str]:
    """The images at any depth below a class's directory, ordered by the directories' paths and then by the files' names.

    Raises:
        InputError: when there are none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    images, others = list[str](), list[str]()
    for _, files in sorted(_directories(directory, [])):
        for file in files:
            (images if file.lower().endswith(IMG_EXTENSIONS) else others).append(file)
    if not images:
        raise InputError(f"{directory}: holds no images (known by {', '.join(IMG_EXTENSIONS)}); remove the directory or fill it")
    if others:
        logger.info("%s: %d files are left out, which are no images by their suffix: %s …", directory, len(others), others[0])
    return images


def _directories(directory: str, above: list[str]) -> Iterator[tuple[str, list[str]]]:
    """A directory and all below it, each with its files.

    Raises:
        InputError: when one cannot be read, or is a link to one of those it lies in.
    """
    real = os.path.realpath(directory)
    if real in above:
        raise InputError(f"{directory}: a link to a directory that it lies in; remove it")
    entries = listed(directory)
    yield directory, [entry.path for entry in entries if not entry.is_dir()]
    for entry in entries:
        if entry.is_dir():
            yield from _directories(entry.path, [*above, real])
