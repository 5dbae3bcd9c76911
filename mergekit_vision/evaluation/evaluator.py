"""Accuracy of an encoder on a task, exact over any number of processes."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.backbone import Backbone, weights_fingerprint
from mergekit_vision.encoders.heads import ZeroShotHeads
from mergekit_vision.encoders.routed import Route
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.evaluation.metric import TaskMetric
from mergekit_vision.merger import Weights
from mergekit_vision.routers import LowRankExperts
from mergekit_vision.support.cache import Cache, json_form
from mergekit_vision.support.fingerprints import of_tensors
from mergekit_vision.support.json_files import to_json
from mergekit_vision.support.source_code import code_fingerprint, versions
from mergekit_vision.support.team import ALONE, Team


@dataclass(frozen=True)
class Runtime:
    """Where this process runs, and with whom.

    Attributes:
        device: of the encoder and the heads.
        team: the processes that work on the same.
        precision: makes the context of evaluation's forward passes, such as autocast; merging is always float32.
        precision_name: its name, for the cache of accuracies.
    """

    device: torch.device
    team: Team = ALONE
    precision: Callable[[], AbstractContextManager[None]] = nullcontext
    precision_name: str = "32-true"


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Measures what an encoder knows. Lightning's loops and our own go through :meth:`step`.

    Attributes:
        encoder: a linearized vision tower on the runtime's device.
        heads: gives the zero-shot heads of all tasks, on the same device; made when they are first asked for.
        data: images of every task.
        backbone: what the encoder is.
        runtime: where it runs.
        pretrained: the backbone's weights, whatever the encoder has.
        experts: of a dynamic model, the tasks whose experts it routes to, in their order.
    """

    encoder: VisionEncoder
    heads: Callable[[], ZeroShotHeads]
    data: VisionTasks
    backbone: Backbone
    runtime: Runtime
    pretrained: Weights
    experts: tuple[str, ...] = ()

    def step(self, metric: TaskMetric, images: Tensor, labels: Tensor, task: str) -> None:
        """Count one batch of one task: images ``[N, 3, H, W]`` and labels ``[N]``; a dynamic encoder is told the true task."""
        self.tell(task, images)
        metric.update(self.heads()(self.encoder(images), task), labels)

    def tell(self, task: str, images: Tensor) -> None:
        """Tell a dynamic encoder the true task of the images that it gets next: an oracle goes by it, and choices are counted."""
        if (routing := self.encoder.routing) is not None:
            known = task in self.experts
            routing.truth = torch.full((len(images),), self.experts.index(task), device=images.device) if known else None

    def accuracy(self, task: str, split: str) -> float:
        """Accuracy in [0, 1] of the weights that the encoder has; every process takes its share of the images.

        Raises:
            EvaluationError: on every process, when an image or a label cannot be used.
        """
        return self.accuracies([self], task, split)[0]

    @torch.inference_mode()
    def accuracies(self, models: Sequence["Evaluator"], task: str, split: str) -> list[float]:
        """As :meth:`accuracy`, of several models with encoders of their own: each image is decoded once for all of them."""
        device, loader, failure = self.runtime.device, self.data.loader(task, split), None
        metrics = [TaskMetric().to(device) for _ in models]
        try:
            with self.runtime.precision():
                for batch in loader:
                    images, labels = (part.to(device, non_blocking=True) for part in batch)
                    for model, metric in zip(models, metrics, strict=True):
                        model.step(metric, images, labels, task)
        except InputError as error:
            failure = EvaluationError(str(error))
        self.runtime.team.raise_together(failure)  # the others would wait for this process's counts
        return [metric.accuracy(self.data.size(task, split)) for metric in metrics]

    def expert(self, task: str) -> Weights:
        """The weights of a task's own expert."""
        return self.data.suite.experts[task].on(self.pretrained)

    def expert_accuracy(self, task: str, split: str) -> float:
        """Accuracy of a task's own expert, remembered by its weights, the data, the head, the code and where it runs."""
        expert = self.data.suite.experts[task]
        # others follow the backbone, in parameters of which they say nothing, or only how they changed
        whole = not expert.relative and all(key in expert.shapes for key in self.pretrained)
        parts = (
            expert.fingerprint(),
            "" if whole else weights_fingerprint(self.data.suite.backbone, self.data.suite.pretrained),
            to_json([dict(self.backbone.model), dict(self.backbone.preprocess)]),
            of_tensors({"head": self.heads().weight(task)}),
            self.data.fingerprint(task, split),
            self.runtime.precision_name,
            self.runtime.device.type,
            *_code(),
        )

        def measure() -> float:
            with self.with_weights(self.expert(task)) as evaluator:
                return evaluator.accuracy(task, split)

        return Cache("accuracies", json_form(_share), self.runtime.team).recall(parts, measure)

    @contextmanager
    def with_weights(self, weights: Weights, block: int | None = None) -> Iterator["Evaluator"]:
        """The same encoder with other weights, without routed experts, while the context is open.

        Args:
            weights: see :meth:`VisionEncoder.assign`.
            block: which of them; all where ``None``.
        """
        before, routing = self.encoder.weights(), self.encoder.routing
        mode = None if routing is None else routing.mode
        try:
            self.encoder.assign(weights, block)
            if routing is not None:
                routing.mode = "base"
            yield self
        finally:
            self.encoder.assign(before, block)
            if routing is not None and mode is not None:
                routing.mode = mode

    @contextmanager
    def with_model(
        self,
        weights: Weights,
        routed: Mapping[str, LowRankExperts] | None = None,
        experts: Sequence[str] = (),
        route: Route = "router",
        apart: bool = False,
    ) -> Iterator["Evaluator"]:
        """An evaluator of a merged model, static or dynamic, while the context is open.

        Args:
            weights: of the encoder.
            routed: Linear name -> its routed experts.
            experts: their tasks, in their order.
            route: how the model chooses among them.
            apart: in an encoder of its own, so that several can be open at once; one that is routed always is.
        """
        with self.with_weights(weights):
            encoder = _twin(self.encoder) if routed or apart else self.encoder
            encoder.route(routed or {}, route)
            yield replace(self, encoder=encoder, experts=tuple(experts))

    def routing_counts(self) -> dict[str, Tensor]:
        """Which expert the images of each task took in each routed layer, ``[T, T]``, over all processes; each must call it."""
        routing = self.encoder.routing
        counts = {} if routing is None else {layer: count.cpu() for layer, count in routing.counts.items()}
        parts = self.runtime.team.gather(counts)
        return {layer: torch.stack([part[layer] for part in parts]).sum(0) for layer in counts}


def _twin(encoder: VisionEncoder) -> VisionEncoder:
    """A copy that shares the weights until one of the two is assigned others."""
    shared = {id(weight): nn.Parameter(weight.data, weight.requires_grad) for weight in encoder.parameters()}
    return copy.deepcopy(encoder, shared)


@functools.cache
def _code() -> tuple[str, str]:
    """What measures: our code, and the libraries' versions."""
    return code_fingerprint([Evaluator]) or "", to_json(versions())


def _share(value: Any) -> float:
    if not (isinstance(value, float | int) and 0 <= value <= 1):
        raise ValueError("not an accuracy")
    return float(value)
