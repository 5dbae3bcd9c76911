"""Accuracy of an encoder on a task, exact over any number of processes, and the experts' own accuracies kept on disk."""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

from mergekit_vision.files import cache_dir, replacing
from mergekit_vision.heads import ZeroShotHeads
from mergekit_vision.version import __version__

Batches = Iterable[tuple[Tensor, Tensor]]


class TaskMetric(nn.Module):
    """Top-1 accuracy of one task, and the number of images it was counted on.

    Args:
        classes: number of classes of the task.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        # micro averaging divides the images that are right by all images, on uneven shards too
        self.accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.images = SumMetric()

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits ``[N, classes]``, labels ``[N]``."""
        self.accuracy.update(logits, labels)
        self.images.update(len(labels))

    def compute(self, expected: int) -> float:
        """Accuracy in [0, 1] over all processes.

        Raises:
            RuntimeError: when another number of images than ``expected`` was seen.
        """
        seen = int(self.images.compute())
        if seen != expected:
            raise RuntimeError(f"evaluated {seen} images of a data set that has {expected}")
        return round(float(self.accuracy.compute()) * seen) / seen  # float32 holds the share, not the quotient


@torch.inference_mode()
def measure(
    encoder: nn.Module,
    heads: ZeroShotHeads,
    task: str,
    batches: Batches,
    expected: int,
    device: torch.device,
    precision: AbstractContextManager[None] | None = None,
) -> float:
    """Accuracy of an encoder on one task; every process takes its share of the images.

    Args:
        encoder: image batch -> embeddings.
        heads: zero-shot heads.
        task: whose head is used.
        batches: this process's batches of images and labels.
        expected: number of images in the whole data set.
        device: where the encoder is.
        precision: context of the forward pass, such as autocast.
    """
    metric = TaskMetric(len(heads.weight(task))).to(device)
    with precision or nullcontext():
        for images, labels in batches:
            metric.update(heads(encoder(images.to(device, non_blocking=True)), task), labels.to(device, non_blocking=True))
    return metric.compute(expected)


def remembered(parts: Iterable[str], compute: Callable[[], float], share: Callable[[float | None], float | None]) -> float:
    """An accuracy from the cache, or computed and kept there.

    Args:
        parts: everything the value depends on; hashed to the cache's key.
        compute: measures it, on all processes together.
        share: gives every process the first one's value, so that all of them compute or none.
    """
    key = hashlib.blake2b("\n".join([__version__, *parts]).encode(), digest_size=20).hexdigest()
    path = cache_dir() / "accuracies" / f"{key}.json"
    value = share(_read(path.read_text()) if path.is_file() else None)
    if value is None:
        value = compute()
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"accuracy": value}))
    return value


def _read(text: str) -> float | None:
    """The cached value; ``None`` for a file that something else has spoilt."""
    try:
        return float(json.loads(text)["accuracy"])
    except (ValueError, KeyError, TypeError):
        return None
