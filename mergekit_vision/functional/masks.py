"""Masks of weights in one bit a weight."""

import torch
from torch import Tensor
from torch.nn import functional as F

_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean mask of ``n`` entries, of any shape, as ``ceil(n / 8)`` bytes.

    >>> pack_bits(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    bits = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits * bits.new_tensor(_BITS)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """The boolean mask of a shape that :func:`pack_bits` packed."""
    bits = packed[:, None].bitwise_and(packed.new_tensor(_BITS)) != 0
    return bits.flatten()[: shape.numel()].view(shape)
