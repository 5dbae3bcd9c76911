"""How well a merged model agrees with the experts on unlabeled proxy images, each expert the teacher of its own task."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.support.console import logger, track


class Agreement(NamedTuple):
    """Agreement of a model with the experts on the proxy images of their tasks.

    Attributes:
        classes: task -> share of its images on which model and expert name the same class, in [0, 1].
        divergence: task -> mean Kullback-Leibler divergence of the model's class probabilities from its expert's, in nats. Both
            are the softmax of zero-shot logits at the CLIP model's own logit scale.
        cosine: task -> mean cosine of the model's image embeddings with its expert's, in [-1, 1].
    """

    classes: dict[str, float]
    divergence: dict[str, float]
    cosine: dict[str, float]

    @property
    def share(self) -> float:
        """Mean share over the tasks."""
        return fmean(self.classes.values())

    @property
    def distance(self) -> float:
        """What a choice without labels minimizes: the mean divergence over the tasks, in nats.

        The share is a coarse curve on a few images a task, and the embeddings differ in directions in which no class does, so
        that they ask for too small a coefficient. ``benchmarks/agreement.py`` compares them.
        """
        mean = fmean(self.divergence.values())
        return math.inf if math.isnan(mean) else max(0.0, mean)  # rounding may take it below 0


class _Opinion(NamedTuple):
    """What a model says of images: unit embeddings ``[n, embed_dim]`` and log-probabilities of classes ``[n, classes]``."""

    embeddings: Tensor
    classes: Tensor


class ExpertTeachers:
    """The experts' opinions of their own tasks' proxy images, asked for once.

    Args:
        evaluator: of the backbone.
        experts: tasks whose experts are merged.

    Attributes:
        backbone: how well the backbone agrees with them.

    Raises:
        InputError: when a task has no proxy images.
    """

    def __init__(self, evaluator: Evaluator, experts: Sequence[str]) -> None:
        self._opinions: dict[str, _Opinion] = {}
        for task in track(list(experts), "experts on proxies"):
            with evaluator.with_weights(evaluator.expert(task)) as expert:
                self._opinions[task] = _opinion(expert, task)
        self.backbone = self.agreement(evaluator)

    def agreement(self, model: Evaluator) -> Agreement:
        """How well an evaluator's model agrees with the experts."""
        classes, divergence, cosine = {}, {}, {}
        for task, expert in self._opinions.items():
            found = _opinion(model, task)
            classes[task] = float((found.classes.argmax(-1) == expert.classes.argmax(-1)).double().mean())
            divergence[task] = float(
                (expert.classes.exp() * (expert.classes - found.classes)).sum(-1, dtype=torch.float64).mean()
            )
            cosine[task] = float((expert.embeddings * found.embeddings).sum(-1, dtype=torch.float64).mean())
        return Agreement(classes, divergence, cosine)

    def warn_below_backbone(self, chosen: Agreement) -> None:
        """Name the tasks on which a model agrees less with their experts than the backbone does."""
        for task, share in chosen.classes.items():
            if share < (before := self.backbone.classes[task]):
                logger.warning(
                    "task %s ends below the backbone: the merged model agrees with its expert on %.0f %% of the proxy images, "
                    "the backbone on %.0f %%",
                    task,
                    100 * share,
                    100 * before,
                )


@torch.inference_mode()
def _opinion(evaluator: Evaluator, task: str) -> _Opinion:
    heads, device = evaluator.heads(), evaluator.runtime.device

    def embedded(images: Tensor) -> Tensor:
        evaluator.tell(task, images)
        embeddings: Tensor = evaluator.encoder(images)
        return embeddings

    try:
        embeddings = torch.cat([embedded(images.to(device)) for images in evaluator.data.proxy_loader(task)])
    except InputError as error:
        raise type(error)(f"{error}; a coefficient chosen by agreement needs proxy images of every merged task") from error
    return _Opinion(F.normalize(embeddings.float(), dim=-1), heads(embeddings, task).log_softmax(-1))
