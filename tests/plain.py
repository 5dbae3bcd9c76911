"""An encoder in float64 that is run from the images every time: what methods that go block by block are compared with."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from threading import Barrier
from typing import Any

import torch
from synthetic import INFOS, NORMS, Zoo
from tolerances import eps
from torch import Tensor, nn

from mergekit_vision.merger import LinearInfo, Merged, MergeInputs, Merger, NormInfo, Observer, Streams
from mergekit_vision.merging.workbench import Workbench

Weights = dict[str, Tensor]
Run = Callable[[str, Weights, list[str]], dict[str, Tensor]]


class Plain:
    """Weights of a backbone and its experts in float64, and the inputs of named layers on a task's proxies.

    Args:
        base: of the backbone.
        experts: task -> weights.
        run: gives the inputs of some layers, ``[images, tokens, d_in]``, of a task, weights and the layers' names.
        noise: seed of noise of float32's precision in all task vectors and inputs.
    """

    def __init__(
        self, base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], run: Run, noise: int | None
    ) -> None:
        self.generator = None if noise is None else torch.Generator().manual_seed(noise)
        self.base = {key: value.double() for key, value in base.items()}
        self.deltas = {
            task: {key: self._noisy((weights[key] - value).double()) for key, value in base.items()}
            for task, weights in experts.items()
        }
        self.experts = {task: added(self.base, deltas) for task, deltas in self.deltas.items()}
        self._run = run

    def inputs(self, task: str, weights: Weights, layers: Iterable[LinearInfo | NormInfo]) -> dict[str, Tensor]:
        """Inputs of layers by name."""
        return {name: self._noisy(x) for name, x in self._run(task, weights, [layer.name for layer in layers]).items()}

    def delta(self, key: str) -> list[Tensor]:
        """Task vectors of all tasks."""
        return [deltas[key] for deltas in self.deltas.values()]

    def _noisy(self, x: Tensor) -> Tensor:
        if self.generator is None:
            return x
        return x + eps() * x.square().mean().sqrt() * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


def added(base: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Weights:
    """Weights with an update."""
    return {key: value + update[key] if key in update else value for key, value in base.items()}


class Subject:
    """An encoder's merge inputs, and the same for formulas."""

    def __init__(self, source: Zoo | Workbench) -> None:
        if isinstance(source, Zoo):
            self.inputs, self.linears, self.norms = source.inputs(), INFOS, NORMS
            self._run: Run = lambda task, weights, names: _through_zoo(source, task, weights, names)
        else:
            data, encoder = source.evaluator.data, deepcopy(source.evaluator.encoder).double()
            self.inputs, self.linears, self.norms = source.inputs(data.suite.experts), encoder.linears, encoder.norms
            images = {task: torch.cat(list(data.proxy_loader(task))).double() for task in data.suite.experts}
            self._run = lambda task, weights, names: _through_encoder(encoder, images[task], weights, names)

    def plain(self, noise: int | None = None) -> Plain:
        """For formulas; see :class:`Plain`."""
        return Plain(self.inputs.base, self.inputs.experts, self._run, noise)

    def check(self, found: Mapping[str, Tensor], formula: Callable[[Plain], Weights], most: float = 1e-5) -> None:
        """Compare an update with a formula of the whole model, as closely as the formula's own condition lets float32 know it."""
        expected, moved = formula(self.plain()), [formula(self.plain(noise)) for noise in range(2)]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            norm = value.norm()
            bound = 8 * (max(float((other[key] - value).norm() / norm) for other in moved) + eps())
            error = float((found[key].double() - value).norm() / norm)
            assert error < min(bound, most), f"{key}: off by {error:.1e}, not {bound:.1e}"


@torch.no_grad()
def _through_zoo(zoo: Zoo, task: str, weights: Weights, names: list[str]) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    tokens = zoo.embed(task, weights)
    for index in range(INFOS[-1].block + 1):
        observers = {name: x.append for name, x in seen.items() if f".{index}." in name}
        tokens = zoo.block(index, weights, tokens, observers)
    return {name: torch.cat(x) for name, x in seen.items()}


@torch.no_grad()
def _through_encoder(encoder: nn.Module, images: Tensor, weights: Weights, names: list[str]) -> dict[str, Tensor]:
    for name, parameter in encoder.named_parameters():
        parameter.data = weights[name.replace("in_proj.", "in_proj_")]
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        return encoder.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.update({name: args[0]}))

    handles = [watch(name) for name in names]
    encoder(images)
    for handle in handles:
        handle.remove()
    return seen


class Counted:
    """Streams that count what is run."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.embeddings, self.blocks = streams, 0, 0

    def embed(self, task: str, weights: Mapping[str, Tensor]) -> Tensor:
        self.embeddings += 1
        return self.streams.embed(task, weights)

    def block(self, index: int, weights: Mapping[str, Tensor], tokens: Tensor, observers: Mapping[str, Observer]) -> Tensor:
        self.blocks += 1
        return self.streams.block(index, weights, tokens, observers)


def together(inputs: MergeInputs, merger: Merger, rotate: bool) -> list[Merged]:
    """What two processes, here threads, find that share the work; with ``rotate``, a task goes to the other one every time."""
    meeting, table = Barrier(2, timeout=60), dict[int, Any]()

    def run(rank: int) -> Merged:
        calls = 0

        def share(function: Callable[[str], Any], items: Mapping[str, int], description: str) -> dict[str, Any]:
            nonlocal calls
            calls += 1
            own = [item for at, item in enumerate(items) if (at + (calls if rotate else 0)) % 2 == rank]
            try:
                table[rank] = {item: function(item) for item in own}
            except BaseException:
                meeting.abort()
                raise
            meeting.wait()
            found = deepcopy({**table[0], **table[1]})  # what arrives is the receiver's own
            meeting.wait()
            return {item: found[item] for item in items}

        with torch.no_grad():
            return merger.merge(replace(inputs, share=share, processes=2))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))
