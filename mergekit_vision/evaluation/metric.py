"""Accuracy of an encoder on a task, exact over any number of processes, and the experts' own accuracies kept on disk."""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.files import cache_dir, replacing
from mergekit_vision.heads import ZeroShotHeads
from mergekit_vision.version import __version__

Batches = Iterable[tuple[Tensor, Tensor]]


class TaskMetric(nn.Module):
    """Top-1 accuracy of one task, and the number of images it was counted on.

    Counts stay on the device; nothing waits for it before :meth:`compute`. (torchmetrics' own sums look for NaN in every update,
    which does.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = _Counts()

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits ``[N, classes]``, labels ``[N]``."""
        self.counts.update(logits, labels)

    def compute(self, expected: int) -> float:
        """Accuracy in [0, 1] over all processes.

        Raises:
            RuntimeError: when another number of images than ``expected`` was seen.
        """
        right, seen = self.counts.compute().tolist()
        if seen != expected:
            raise RuntimeError(f"evaluated {seen} images of a data set that has {expected}")
        return float(right / seen)


class _Counts(Metric):
    """How many images were right and how many there were, ``[2]``, int64, summed over processes."""

    right_and_seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right_and_seen", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        right = (logits.argmax(-1) == labels).sum()
        self.right_and_seen += torch.stack([right, torch.full_like(right, len(labels))])

    def compute(self) -> Tensor:
        return self.right_and_seen


@torch.inference_mode()
def measure(
    encoder: nn.Module,
    heads: ZeroShotHeads,
    task: str,
    batches: Batches,
    expected: int,
    device: torch.device,
    precision: AbstractContextManager[None] | None = None,
    agree: Callable[[Exception | None], None] | None = None,
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
        agree: told of this process's failure, or of none, raises on all processes if one has failed.

    Raises:
        EvaluationError: when an image or a label cannot be used.
    """
    metric, failure = TaskMetric().to(device), None
    try:
        with precision or nullcontext():
            for images, labels in batches:
                metric.update(heads(encoder(images.to(device, non_blocking=True)), task), labels.to(device, non_blocking=True))
    except InputError as error:
        failure = EvaluationError(str(error))
    if agree is not None:  # the others would wait for this process's counts
        agree(failure)
    elif failure is not None:
        raise failure
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
        with suppress(OSError), replacing(path) as temporary:  # what cannot be kept is computed again
            temporary.write_text(json.dumps({"accuracy": value}))
    return value


def _read(text: str) -> float | None:
    """The cached value; ``None`` for a file that something else has spoilt."""
    try:
        return float(json.loads(text)["accuracy"])
    except (ValueError, KeyError, TypeError):
        return None
