"""What writes one format."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from mergekit_vision.export.agreement import largest_difference
from mergekit_vision.export.merged import MergedModel

Embed = Callable[[Tensor], Tensor]
"""Preprocessed images ``[N, 3, H, W]``, float32, on the CPU, to their embeddings ``[N, embed_dim]``, not normalized."""


class Writer(ABC):
    """Writes merged models in one format, and reads them back with the format's own library alone."""

    def faults(self, model: MergedModel) -> list[str]:
        """Why the format cannot hold a model, each with its reason; nothing where it can."""
        return []

    @abstractmethod
    def write(self, model: MergedModel, directory: Path) -> None:
        """Write a model into an empty directory."""

    @abstractmethod
    def load(self, directory: Path) -> Embed:
        """Load what was written, as someone without this package does."""

    def difference(self, model: MergedModel, directory: Path) -> float:
        """How far the written model's embeddings lie from those of ``model``, at most, relative to their norm."""
        return largest_difference(self.load(directory), model)
