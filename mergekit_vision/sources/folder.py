"""Directories of images."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource, decode
from mergekit_vision.support.fingerprints import digest, stamp


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
    """Unlabeled images: the files of one directory in order of their names, or a single file.

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
