"""Runs mergers on one encoder: the bridge between weights, images and the contract."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.backbone import BackboneWeights, describe_backbone, load_clip, load_tokenizer
from mergekit_vision.encoders.heads import LazyHeads, ZeroShotHeads, build_heads, text_weights
from mergekit_vision.encoders.hooks import capture_inputs, capture_outputs
from mergekit_vision.encoders.vision import BEFORE, VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Evaluator, Runtime
from mergekit_vision.merger import (
    Former,
    GradientObserver,
    Merged,
    MergeInputs,
    Merger,
    Observer,
    Spread,
    Weights,
    merged_weights,
)
from mergekit_vision.merging.streaming import copies_to, read_ahead
from mergekit_vision.support.console import track
from mergekit_vision.support.scratch import joined


@dataclass
class Workbench:
    """A pre-trained encoder that takes on any weights for a while, and the mergers' inputs around it.

    Attributes:
        evaluator: of the encoder, which has the weights ``base`` between uses.
        base: the backbone's weights.
        text: what the backbone holds besides its vision tower.
        curves: what coefficient searches found, by the content of what they scaled.
        own: split -> task -> accuracy of the task's own expert, of those that were asked for.
    """

    evaluator: Evaluator
    base: Weights
    text: Weights = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    own: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, data: VisionTasks, runtime: Runtime, merged: Path | None = None) -> "Workbench":
        """The suite's backbone, or a model merged before, on the runtime's device. Its files are read once.

        Raises:
            InputError: when the model cannot be loaded.
        """
        suite = data.suite
        name, pretrained = (suite.backbone, suite.pretrained) if merged is None else (f"local-dir:{merged}", None)
        backbone, clip = describe_backbone(name, pretrained), load_clip(name, pretrained)
        encoder = VisionEncoder(clip.visual).to(runtime.device)  # type: ignore[arg-type]
        clip.visual = torch.nn.Identity()  # the text tower alone is left

        def build() -> ZeroShotHeads:
            prompts = {task.name: (task.classes, task.templates) for task in suite.tasks.values()}
            return build_heads(clip, load_tokenizer(name), prompts, backbone.model, runtime.device)

        base = encoder.weights()
        own = base if merged is None else BackboneWeights(describe_backbone(suite.backbone, suite.pretrained))
        evaluator = Evaluator(encoder, LazyHeads(build), data, backbone, runtime, own)
        return cls(evaluator, base, text_weights(clip))

    def own_accuracies(self, tasks: Sequence[str], split: str) -> dict[str, float]:
        """Task -> accuracy of its own expert; measured, or looked up, once."""
        known = self.own.setdefault(split, {})
        for task in track([task for task in tasks if task not in known], f"experts' own accuracy on {split}"):
            known[task] = self.evaluator.expert_accuracy(task, split)
        return {task: known[task] for task in tasks}

    def on(self, data: VisionTasks) -> "Workbench":
        """The same encoder and backbone on a variant of the data; what is found of a model counts for both."""
        return replace(self, evaluator=replace(self.evaluator, data=data))

    def inputs(
        self,
        experts: Mapping[str, Weights],
        choose_scale: Callable[[Merged], float] | None = None,
        keep: int | None = None,
    ) -> MergeInputs:
        """What a merger gets of some experts, task -> weights; see :meth:`merge`."""
        evaluator, runtime = self.evaluator, self.evaluator.runtime
        # Apple's devices have no float64, which the kernels need
        device = torch.device("cpu") if runtime.device.type == "mps" else runtime.device

        def run_proxies(task: str, observers: Mapping[str, Observer], model: Merged | None) -> None:
            if model is not None and any(layer.evidence == "ahead" for layer in model.routed.values()):
                raise InputError("a model that decides ahead runs in part twice and cannot be observed; observe its base")
            watch = _Watch(f"the expert of task {task}" if model is None else f"the merged model on task {task}")
            weights, routed = (experts[task], None) if model is None else (merged_weights(self.base, model), model.routed)
            moved = watch.moving(observers, device)
            with evaluator.with_model(weights, routed) as running, capture_inputs(running.encoder, moved):
                for images in evaluator.data.proxy_loader(task):
                    running.encoder(images.to(runtime.device))
            watch.check()

        def run_backward(task: str, observers: Mapping[str, GradientObserver], model: Merged) -> None:
            if model.routed or model.experts:
                raise InputError("a model with routed or compressed experts cannot be differentiated; take a static one")
            if observers:
                _run_backward(evaluator, task, experts[task], merged_weights(self.base, model), observers, device)

        share: Spread = partial(runtime.team.spread, device=device)
        if (copies := copies_to(device)) is not None and experts:
            experts, share = read_ahead(experts, self.base, runtime.team, share, copies)
        return MergeInputs(
            self.base,
            experts,
            evaluator.encoder.linears,
            device,
            run_proxies,
            choose_scale,
            track,
            share,
            evaluator.encoder.norms,
            evaluator.encoder.depths,
            _Streams(evaluator, device),
            keep=keep,
            run_backward=run_backward,
            processes=runtime.team.size,
        )

    @torch.no_grad()
    def merge(
        self,
        merger: Merger,
        experts: Mapping[str, Weights],
        choose_scale: Callable[[Merged], float] | None = None,
        keep: int | None = None,
    ) -> Merged:
        """Run a merger on some experts, task -> weights; ``choose_scale`` answers a merger that builds on a scaled model.

        What later revisions need is kept where ``keep`` is given (:attr:`~mergekit_vision.merger.MergeInputs.keep`).

        Raises:
            InputError: when the merger refuses its inputs, or returns what it must not.
        """
        return self._checked(merger.merge(self.inputs(experts, choose_scale, keep)), type(merger).__name__, len(experts))

    @torch.no_grad()
    def revise(self, merger: Merger, former: Former, joining: Mapping[str, Weights], leaving: Mapping[str, Weights]) -> Merged:
        """Have a merger take experts into a model that it merged before, and out of it.

        Raises:
            InputError: as :meth:`merge`, or when what was kept of the model does not suffice.
        """
        tasks = len(former.tasks) + len(joining) - len(leaving)
        return self._checked(merger.revise(former, self.inputs(joining), self.inputs(leaving)), type(merger).__name__, tasks)

    def _checked(self, merged: Merged, name: str, tasks: int) -> Merged:
        """Refuse what a plugin must not return, before it is silently ignored, broadcast or rounded; float64 becomes float32."""
        update = {}
        for key, value in merged.update.items():
            if key not in self.base:
                raise InputError(f"{name} returned an update for {key}, which the encoder does not have")
            if value.shape != self.base[key].shape:
                shapes = f"{tuple(value.shape)}, not {tuple(self.base[key].shape)}"
                raise InputError(f"{name} returned an update of the wrong shape for {key}: {shapes}")
            if value.dtype not in (torch.float32, torch.float64):
                raise InputError(f"{name} returned an update in {value.dtype} for {key}, but must return float32, or float64")
            update[key] = value.float()
            if not update[key].isfinite().all():
                raise InputError(f"{name} returned NaN or infinity for {key}")
        self._check_experts(merged, name, tasks)
        return replace(merged, update=update)

    def _check_experts(self, merged: Merged, name: str, tasks: int) -> None:
        """Refuse routed experts of no layer, of other tasks, or whose router does not score them."""
        layers = [linear.name for linear in self.evaluator.encoder.linears]
        for layer, experts in merged.routed.items():
            if layer not in layers:
                raise InputError(f"{name} returned experts for {layer}, which is no Linear layer of the encoder")
            if len(experts.up) != tasks:
                raise InputError(
                    f"{name} returned {len(experts.up)} experts for {layer}, but there are {tasks} tasks, each with one"
                )
            try:
                experts.check_router()
            except ValueError as error:
                raise InputError(f"{name} returned experts for {layer} that cannot be used: {error}") from error


GRAPH = 8
"""Images whose activations are kept for the way back: some thirty numbers a token and block, in units of the width."""

TOKENS = 4096
"""Tokens that run through a block at once on a CPU, where more are no faster: some twenty numbers each, in units of the width."""


@dataclass(frozen=True, eq=False)
class _Streams:
    """Runs proxy images block by block with the evaluator's encoder; see :class:`~mergekit_vision.merger.Streams`.

    Attributes:
        evaluator: whose encoder, which has its own weights again after every call, and images.
        device: where tokens and observed inputs are wanted.
    """

    evaluator: Evaluator
    device: torch.device

    @torch.no_grad()
    def embed(self, task: str, weights: Weights) -> Tensor:
        """The tokens that enter block 0."""
        with self.evaluator.with_weights(weights, BEFORE) as running:
            device = running.runtime.device
            loader = running.data.proxy_loader(task)
            return joined([running.encoder.embed(images.to(device)).to(self.device) for images in loader])

    @torch.no_grad()
    def block(self, index: int, weights: Weights, tokens: Tensor, observers: Mapping[str, Observer]) -> Tensor:
        """The tokens that leave a block."""
        watch = _Watch("an expert, or the merged model")
        moved = watch.moving(observers, self.device)
        with self.evaluator.with_weights(weights, index) as running, capture_inputs(running.encoder, moved):
            device, run = running.runtime.device, running.encoder.run_block
            images = running.data.batch_size
            if device.type == "cpu":
                images = min(images, max(1, TOKENS // tokens.shape[1]))
            parts = torch.split(tokens, images)
            left = joined([run(index, part.to(device)).to(self.device) for part in parts])
        watch.check()
        return left


def _run_backward(
    evaluator: Evaluator,
    task: str,
    expert: Weights,
    model: Weights,
    observers: Mapping[str, GradientObserver],
    device: torch.device,
) -> None:
    """Show observers inputs of layers of a model, and gradients by their outputs of its divergence from an expert."""
    head = evaluator.heads().weight(task).float().clone()  # what was made in inference mode has no gradient
    at, watch = evaluator.runtime.device, _Watch(f"the merged model on task {task}, or the task's expert")

    def opinion(running: Evaluator, images: Tensor) -> Tensor:
        return (F.normalize(running.encoder(images).float(), dim=-1) @ head.T).log_softmax(-1)

    with evaluator.with_weights(expert) as running:
        targets = [opinion(running, images.to(at)).exp() for images in evaluator.data.proxy_loader(task)]
    with evaluator.with_weights(model) as running, capture_outputs(running.encoder, observers) as seen:
        for batch, target in zip(evaluator.data.proxy_loader(task), targets, strict=True):
            for images, wanted in zip(torch.split(batch, GRAPH), torch.split(target, GRAPH), strict=True):
                with torch.enable_grad():
                    opinions = opinion(running, images.to(at).clone().requires_grad_())
                    divergence = -(wanted * opinions).sum()  # up to the expert's entropy, a constant
                    gradients = torch.autograd.grad(divergence, [seen[name][1] for name in observers])
                for (name, observer), gradient in zip(observers.items(), gradients, strict=True):
                    x, gradient = seen[name][0].detach().float().to(device), gradient.float().to(device)
                    watch.see(name, x, gradient)
                    observer(x, gradient)
                seen.clear()
    watch.check()


class _Watch:
    """Finds NaN and infinity in what observers are fed; nothing waits for the device before :meth:`check`.

    Args:
        whose: what runs, for the message.
    """

    def __init__(self, whose: str) -> None:
        self._whose, self._largest = whose, dict[str, Tensor]()

    def moving(self, observers: Mapping[str, Observer], device: torch.device) -> dict[str, Observer]:
        """The same observers, of inputs on a device, which are seen before."""

        def hand_over(name: str, x: Tensor) -> None:
            x = x.to(device)
            self.see(name, x)
            observers[name](x)

        return {name: partial(hand_over, name) for name in observers}

    def see(self, name: str, *values: Tensor) -> None:
        """Take note of the largest magnitude of a layer's values; of NaN, if there is any."""
        for value in values:
            least, most = value.aminmax()
            self._largest[name] = torch.stack([self._largest.get(name, most), -least, most]).amax()

    def check(self) -> None:
        """Refuse NaN and infinity, in the first layer that got any."""
        found = torch.stack(list(self._largest.values())).isfinite().tolist() if self._largest else []
        for name, finite in zip(self._largest, found, strict=True):
            if not finite:
                raise InputError(
                    f"{self._whose}: layer {name} gets NaN or infinity on the proxy images; leave out the expert whose weights "
                    "are too large, or fine-tune it again"
                )
