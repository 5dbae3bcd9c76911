"""Statistics of a router that sends each image to one expert."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "deviation", "first"]


def pool_tokens(x: Tensor, pooling: Sequence[Pooling] = ("mean",)) -> Tensor:
    """One feature vector per image, from its tokens.

    Args:
        x: ``[N, L, d]``.
        pooling: what to put side by side: the "mean" over tokens, their standard "deviation", the "first" token (the class's).

    Returns:
        ``[N, len(pooling) * d]``.

    >>> pool_tokens(torch.tensor([[[1.0, 5.0], [3.0, 5.0]]]), ("mean", "deviation", "first"))
    tensor([[2., 5., 1., 0., 1., 5.]])
    """
    mean = x.mean(1)
    parts = {"mean": mean, "first": x[:, 0]}
    if "deviation" in pooling:  # torch.var is many times slower over this dimension on the CPU
        parts["deviation"] = (x - mean.unsqueeze(1)).square().mean(1).sqrt()
    return torch.cat([parts[part] for part in pooling], dim=-1)


def discriminant(features: Sequence[Tensor], shrinkage: float) -> tuple[Tensor, Tensor]:
    """Linear discriminant between tasks of equal probability that share one covariance.

    The covariance within tasks, ``S``, is pooled over tasks and shrunk towards its own diagonal, ``(1 - shrinkage) S +
    shrinkage diag(S)``: a few images a task are far fewer than the features. It is never formed (Woodbury's identity).

    Args:
        features: for each task, its images' features, ``[n_t, f]``.
        shrinkage: between 0 (excluded) and 1.

    Returns:
        ``weight [T, f]`` and ``bias [T]``, float64: ``weight @ x + bias`` are the log-posteriors of ``x`` up to a constant.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> a, b = torch.randn(2, 50, 3, generator=generator)
        >>> weight, bias = discriminant([a, b + torch.tensor([4.0, 0.0, 0.0])], shrinkage=0.5)
        >>> (weight @ torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64) + bias).argmax().item()
        1
    """
    groups = [group.double() for group in features]
    means = torch.stack([group.mean(0) for group in groups])
    rest = torch.cat([group - mean for group, mean in zip(groups, means, strict=True)])
    freedom = max(len(rest) - len(groups), 1)
    variance = rest.square().sum(0) / freedom
    deviation = variance.clamp_min(1e-8 * variance.mean().clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    # In units of the deviations the shrunk covariance is shrinkage * I + (1 - shrinkage) / freedom * CᵀC.
    C, M = rest / deviation, (means - means.mean(0)) / deviation
    ratio = (1 - shrinkage) / (freedom * shrinkage)
    inner = torch.eye(len(C), dtype=C.dtype, device=C.device) + ratio * (C @ C.T)
    scaled = (M - ratio * torch.linalg.solve(inner, C @ M.T).T @ C) / shrinkage
    weight = scaled / deviation
    bias = -0.5 * (scaled * M).sum(1) - weight @ means.mean(0)
    return weight, bias
