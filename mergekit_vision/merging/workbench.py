"""Runs mergers and measures accuracies with one encoder: the bridge between weights, images and the contract."""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from mergekit_vision.checkpoints import CheckpointWeights
from mergekit_vision.data import VisionTasks
from mergekit_vision.encoder import Backbone, VisionEncoder, merged_weights
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation import measure, remembered
from mergekit_vision.files import fingerprint
from mergekit_vision.heads import ZeroShotHeads
from mergekit_vision.hooks import capture_inputs
from mergekit_vision.layers import LowRankExperts
from mergekit_vision.merger import Merged, MergeInputs, Merger, Observer, Weights
from mergekit_vision.parallel import ALONE, Team
from mergekit_vision.progress import say, track
from mergekit_vision.scaling import ScaleSearch, search_scale


def _moving(observer: Observer, device: torch.device) -> Observer:
    return lambda x: observer(x.to(device))


@dataclass
class Workbench:
    """One encoder that lends itself to whatever weights are to be run; it has the backbone's whenever nobody uses it.

    Attributes:
        backbone: its description.
        encoder: a linearized vision tower on ``device``.
        base: the backbone's weights.
        heads: zero-shot heads, on ``device``.
        data: images and proxies of every task.
        device: where everything runs.
        team: the processes that work on the same.
        precision: makes the context of evaluation's forward passes, such as autocast; proxies run in float32.
        precision_name: its name, for the cache of accuracies.
        curves: what searches found, by the content of what they scaled.
    """

    backbone: Backbone
    encoder: VisionEncoder
    base: Weights
    heads: ZeroShotHeads
    data: VisionTasks
    device: torch.device
    team: Team = ALONE
    precision: Callable[[], AbstractContextManager[None]] = nullcontext
    precision_name: str = "32-true"
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    @contextmanager
    def wearing(self, weights: Weights) -> Iterator[VisionEncoder]:
        """The encoder with other weights, while the context is open."""
        try:
            self.encoder.assign(weights)
            yield self.encoder
        finally:
            self.encoder.assign(self.base)

    @contextmanager
    def using(self, weights: Weights, routed: Mapping[str, LowRankExperts] | None = None) -> Iterator["Workbench"]:
        """A workbench whose encoder is a merged model, static or dynamic, while the context is open."""
        with self.wearing(weights) as encoder:
            if routed:
                encoder = copy.deepcopy(encoder)
                encoder.route(routed)
            yield replace(self, encoder=encoder)

    def inputs(self, experts: Mapping[str, Weights], choose_scale: Callable[[Merged], float] | None = None) -> MergeInputs:
        """What a merger gets of some experts, task -> weights; see :meth:`merge`."""
        # Apple's devices have no float64, which the kernels need
        device = torch.device("cpu") if self.device.type == "mps" else self.device

        def run_proxies(task: str, observers: Mapping[str, Observer], model: Merged | None) -> None:
            moved = {name: _moving(observer, device) for name, observer in observers.items()}
            weights, routed = (experts[task], None) if model is None else (merged_weights(self.base, model), model.routed)
            with self.using(weights, routed) as bench, capture_inputs(bench.encoder, moved):
                for images in self.data.proxy_loader(task):
                    bench.encoder(images.to(self.device))

        share = partial(self.team.spread, device=device)
        return MergeInputs(self.base, experts, self.encoder.linears, device, run_proxies, choose_scale, track, share)

    @torch.no_grad()
    def merge(
        self, merger: Merger, experts: Mapping[str, Weights], choose_scale: Callable[[Merged], float] | None = None
    ) -> Merged:
        """Run a merger on some experts, task -> weights; ``choose_scale`` answers a merger that builds on a scaled model."""
        return self._check(merger.merge(self.inputs(experts, choose_scale)), type(merger).__name__)

    def _check(self, merged: Merged, name: str) -> Merged:
        """Refuse what a plugin must not return, before it is silently ignored or broadcast."""
        for key, value in merged.update.items():
            if key not in self.base:
                raise InputError(f"{name} returned an update for {key}, which the encoder does not have")
            if value.shape != self.base[key].shape:
                shapes = f"{tuple(value.shape)}, not {tuple(self.base[key].shape)}"
                raise InputError(f"{name} returned an update of the wrong shape for {key}: {shapes}")
            if not value.isfinite().all():
                raise InputError(f"{name} returned NaN or infinity for {key}")
        return merged

    def accuracy(self, task: str, split: str) -> float:
        """Accuracy in [0, 1] of the weights that the encoder has, over all processes."""
        loader = self.data.loader(task, split)
        expected = len(loader.dataset)  # type: ignore[arg-type]
        return measure(self.encoder, self.heads, task, loader, expected, self.device, self.precision(), self.team.agree)

    def expert_accuracy(self, task: str, split: str, expert: CheckpointWeights) -> float:
        """Accuracy of a task's own expert, measured once for a file, a data set, a head and a precision."""
        head = self.heads.weight(task).cpu().numpy().tobytes()
        parts = (
            fingerprint(expert.path),
            json.dumps([dict(self.backbone.model), dict(self.backbone.preprocess)], sort_keys=True, default=str),
            hashlib.blake2b(head, digest_size=20).hexdigest(),
            self.data.fingerprint(task, split),
            self.precision_name,
        )

        def compute() -> float:
            with self.wearing(expert):
                return self.accuracy(task, split)

        return remembered(parts, compute, lambda value: self.team.broadcast(value, 0))

    def search(self, merged: Merged, search: ScaleSearch, experts: Mapping[str, float]) -> list[dict[str, float]]:
        """Try scaling coefficients on the ``val`` split of the merged tasks.

        Args:
            merged: what is scaled; merged once.
            search: range and effort.
            experts: task -> the expert's own accuracy on ``val``, which normalises.

        Returns:
            Every coefficient tried with its mean accuracy and mean normalised accuracy; the best is first. Remembered: methods
            that build on the same merged model search once.
        """
        if merged.routed:
            return self._search(merged, search, experts)
        key = self.team.broadcast(_content(merged, search, experts), 0)
        if key not in self.curves:
            self.curves[key] = self._search(merged, search, experts)
        return self.curves[key]

    def _search(self, merged: Merged, search: ScaleSearch, experts: Mapping[str, float]) -> list[dict[str, float]]:
        rows = {}

        def normalized(coefficient: float) -> float:
            with self.using(merged_weights(self.base, merged, coefficient), merged.routed) as bench:
                accuracy = {task: bench.accuracy(task, "val") for task in experts}
            mean = sum(accuracy.values()) / len(accuracy)
            score = sum(value / experts[task] for task, value in accuracy.items()) / len(accuracy)
            rows[coefficient] = {"coefficient": coefficient, "accuracy": mean, "normalized": score}
            say(f"coefficient {coefficient:.4g}: accuracy {100 * mean:.2f} %, normalised {100 * score:.2f} % on val")
            return score

        best, _ = search_scale(normalized, search)
        return [rows[best], *(row for coefficient, row in rows.items() if coefficient != best)]


def _content(merged: Merged, search: ScaleSearch, experts: Mapping[str, float]) -> str:
    """What a search depends on, hashed."""
    digest = hashlib.blake2b(repr((search, sorted(experts.items()), sorted(merged.fixed))).encode(), digest_size=20)
    for key, value in sorted(merged.update.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ScaleChoice:
    """Answers at which coefficient a merged model is used, and keeps how that was found.

    Args:
        bench: measures accuracies.
        experts: task -> weights of the merged experts.
        scale: a number, ``merger`` for the method's own, or ``search``.
        search: range and effort of a search.

    Attributes:
        curve: every coefficient a search tried, the best first.
        seconds: time the search took.
    """

    def __init__(
        self, bench: Workbench, experts: Mapping[str, CheckpointWeights], scale: float | str, search: ScaleSearch
    ) -> None:
        self._bench, self._experts, self._scale, self._search = bench, experts, scale, search
        self._used = False
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0

    def __call__(self, merged: Merged) -> float:
        """The coefficient of ``merged``; its own where nothing in it can be scaled."""
        if self._scale == "merger" or not merged.scalable:
            if self._scale != "merger" and not self._used:
                say("this method has no scaling coefficient: there is none to set or to search")
            return merged.scale
        self._used = True
        if self._scale != "search":
            return float(self._scale)
        start = time.perf_counter()
        self.curve = self._bench.search(merged, self._search, self._own_accuracies())
        self.seconds += time.perf_counter() - start
        say(f"chosen: coefficient {self.curve[0]['coefficient']:.4g}")
        return self.curve[0]["coefficient"]

    def _own_accuracies(self) -> dict[str, float]:
        tasks = track(list(self._experts), "experts' own accuracy on val")
        own = {task: self._bench.expert_accuracy(task, "val", self._experts[task]) for task in tasks}
        wrong = [task for task, accuracy in own.items() if not accuracy]
        if wrong:
            raise InputError(f"the expert of {', '.join(wrong)} gets no val image right; check its file, classes and labels")
        return own
