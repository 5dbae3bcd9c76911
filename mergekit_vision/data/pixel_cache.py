"""Decoded pixels kept in memory between passes."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from mergekit_vision.support.console import logger

Batch = tuple[Tensor, Tensor]
"""Pixels or images ``[N, 3, H, W]`` and labels, int64 ``[N]``."""


@dataclass
class PixelCache:
    """Batches of whole passes over data, up to a total size.

    Attributes:
        limit: bytes of all passes together.
        passes: what a pass was over -> its batches, in order.
        used: bytes kept.
    """

    limit: int
    passes: dict[tuple[str | int, ...], list[Batch]] = field(default_factory=dict)
    used: int = 0
    _told: bool = False

    def keep(self, key: tuple[str | int, ...], batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass batches on, and keep them once the pass is complete, if they fit."""
        kept: list[Batch] = []
        size = 0
        for batch in batches:
            size += batch[0].nbytes
            if self.used + size <= self.limit:
                kept.append(_own(batch))
            else:
                kept.clear()
            yield batch
        if key in self.passes:  # another pass was quicker
            return
        if self.used + size > self.limit:
            self._tell(key, size)
        elif kept:
            self.passes[key] = kept
            self.used += size

    def _tell(self, key: tuple[str | int, ...], size: int) -> None:
        """Say once that not everything is kept, unless nothing was to be."""
        if self.limit and not self._told:
            self._told = True
            what = " ".join(map(str, key[:2]))
            need, left = size / 2**20, (self.limit - self.used) / 2**20
            logger.info(
                "%s: %.0f MiB of pixels do not fit into the %.0f MiB left of cache_mb (of this process); "
                "what does not fit is decoded again on every pass",
                what,
                need,
                left,
            )


def _own(batch: Batch) -> Batch:
    """The batch outside of shared memory, of which machines have little, and every tensor of which holds a file open."""
    pixels, labels = (part.clone() if part.is_shared() else part for part in batch)  # type: ignore[no-untyped-call]
    return pixels, labels
