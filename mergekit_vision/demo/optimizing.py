"""The optimizer that pre-training and fine-tuning share."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_vision.support.console import track


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        images: different images; of each task, where there are several.
        epochs: passes over them.
        rate: highest learning rate, after a warm-up over a twentieth of the steps; a cosine takes it down to 0.
        batch: images a step.
        decay: weight decay of AdamW, on matrices only.
    """

    images: int
    epochs: int
    rate: float
    batch: int = 128
    decay: float = 0.05


def optimize(model: nn.Module, loss: Callable[[Tensor], Tensor], count: int, recipe: Recipe, title: str) -> None:
    """Minimize a loss over batches of indices below ``count`` with AdamW, one warm-up and a cosine."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": recipe.decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
    batches = [batch for _ in range(recipe.epochs) for batch in torch.split(torch.randperm(count), recipe.batch)]
    warm_up = max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / len(batches))),
    )
    for batch in track(batches, title):
        optimizer.zero_grad()
        torch.autograd.backward(loss(batch))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
