"""Tensors that hold what no weight is."""

from collections.abc import Mapping

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float16).max
"""Weights of trained encoders lie far below; above, an evaluation in float16 overflows, and soon one in float32 too."""


def unusable(tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with named floating-point tensors, one text for each that cannot be a weight.

    >>> import torch
    >>> from mergekit_vision.support.tensors import unusable
    >>> unusable({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan]), "c": torch.tensor(-3e38)})
    ['b holds NaN or infinity', 'c holds values up to 3e+38, and no weight is above 65504']
    """
    return [fault for name, tensor in tensors.items() if (fault := _fault(name, tensor))]


def _fault(name: str, tensor: Tensor) -> str | None:
    if not (tensor.numel() and tensor.is_floating_point()):
        return None
    # one pass and no copy: the largest magnitude is NaN if any entry is
    largest = float(torch.linalg.vector_norm(tensor.detach(), torch.inf))
    if largest <= LARGEST:
        return None
    if largest < torch.inf:
        return f"{name} holds values up to {largest:.3g}, and no weight is above {LARGEST:.0f}"
    return f"{name} holds NaN or infinity"
