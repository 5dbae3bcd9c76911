"""A part of another source: the validation images that the field takes from a train split, or the rest of it."""

from collections.abc import Sequence

import torch
from PIL import Image

from mergekit_vision.sources.base import ImageSource
from mergekit_vision.support.fingerprints import digest

_CAP = 5000


class PartOf(ImageSource):
    """Some images of another source, in the order they have there.

    Args:
        whole: the other source.
        part: ``val`` or ``train``, see :func:`part_indices`.
        cap: as there.
    """

    def __init__(self, whole: ImageSource, part: str, cap: bool = True) -> None:
        self._whole, self._rule = whole, f"{part} {cap}"
        self.names, self.commit = whole.names, whole.commit
        self._indices = sorted(part_indices(len(whole), part, cap))  # in order: files are read group by group

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and class at ``index`` of this part."""
        return self._whole[self._indices[index]]

    def labels(self) -> Sequence[int]:
        """Class index of every image of this part."""
        labels = self._whole.labels()
        return [labels[index] for index in self._indices]

    def fingerprint(self) -> str:
        """Hash of the whole source and of the rule."""
        return digest(self._whole.fingerprint(), self._rule)


def part_indices(images: int, part: str, cap: bool = True) -> list[int]:
    """Indices of a part of ``images`` rows, as task_vectors and TALL divide train splits: at random, with seed 0.

    Args:
        images: number of rows.
        part: ``val``, a tenth, rounded down; or ``train``, the rest.
        cap: whether ``val`` ends at 5000 images; fusion_bench's does not.

    >>> part_indices(8144, "val")[:3]
    [4911, 3784, 4704]
    """
    held_out = val_size(images, cap)
    order: list[int] = torch.randperm(images, generator=torch.Generator().manual_seed(0)).tolist()
    return order[images - held_out :] if part == "val" else order[: images - held_out]


def val_size(images: int, cap: bool = True) -> int:
    """How many of ``images`` rows the part ``val`` has; arguments as of :func:`part_indices`."""
    return min(images // 10, _CAP) if cap else images // 10
