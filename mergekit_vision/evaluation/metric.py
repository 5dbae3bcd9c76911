"""Exact counts of right predictions."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TaskMetric(Metric):
    """Top-1 accuracy of one task, and the number of images it was counted on, summed over processes.

    Counts stay on the device; nothing waits for it before they are read. (torchmetrics' own sums look for NaN in every update,
    which does.)

    Attributes:
        right_and_seen: how many images were right and how many there were, ``[2]``, int64.
    """

    right_and_seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right_and_seen", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits ``[N, classes]``, labels ``[N]``. An image with NaN or infinity among its logits is wrong."""
        # the largest of NaNs is the first, which would be right for all images of class 0
        right = ((logits.argmax(-1) == labels) & logits.isfinite().all(-1)).sum()
        self.right_and_seen += torch.stack([right, torch.full_like(right, len(labels))])

    def compute(self) -> Tensor:
        """The counts over all processes."""
        return self.right_and_seen

    def accuracy(self, expected: int) -> float:
        """Accuracy in [0, 1] over all processes; each must call it.

        Raises:
            RuntimeError: when another number of images than ``expected`` was seen.
        """
        with torch.inference_mode(False):  # PyTorch before 2.5 cannot gather into inference tensors
            right, seen = self.compute().tolist()
        if seen != expected:
            raise RuntimeError(f"evaluated {seen} images of a data set that has {expected}")
        return float(right / seen)
