"""What the image sources share: a labeled data set."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from PIL import Image
from torch.utils.data import Dataset


class ImageSource(Dataset[tuple[Image.Image, int]], ABC):
    """A map-style data set of ``(RGB image, class index)``.

    Attributes:
        names: class names where the data knows them, else ``None``.
        commit: of the hub's repository that the images are from, where it is known.
    """

    names: tuple[str, ...] | None = None
    commit: str | None = None

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
