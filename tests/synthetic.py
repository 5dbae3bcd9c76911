"""A small made-up encoder with T experts, as merge inputs: the keys, shapes and statistics of a CLIP vision tower."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from mergekit_vision.merger import GradientObserver, LinearInfo, Merged, MergeInputs, NormInfo, Observer, Weights

WIDTH, BLOCKS, TOKENS, PATCH, EMBED, HEADS = 24, 2, 5, 4, 16, 2
KINDS = {
    "attn.in_proj": (3 * WIDTH, WIDTH),
    "attn.out_proj": (WIDTH, WIDTH),
    "mlp.c_fc": (4 * WIDTH, WIDTH),
    "mlp.c_proj": (WIDTH, 4 * WIDTH),
}
LINEARS = tuple(f"visual.transformer.resblocks.{block}.{kind}" for block in range(BLOCKS) for kind in KINDS)


def weight_key(name: str) -> str:
    """Key of the weight of a Linear layer of this encoder."""
    return f"{name}_weight" if name.endswith("in_proj") else f"{name}.weight"


def bias_key(name: str) -> str:
    """Key of its bias."""
    return weight_key(name).replace("weight", "bias")


INFOS = tuple(
    LinearInfo(name, weight_key(name), bias_key(name), name.rpartition(".")[2], position // len(KINDS))
    for position, name in enumerate(LINEARS)
)

BEHIND = ("visual.proj", "visual.ln_post.weight")

NORMS = tuple(
    NormInfo(name, f"{name}.weight", f"{name}.bias", block)
    for block in range(BLOCKS)
    for name in (f"visual.transformer.resblocks.{block}.ln_{at}" for at in (1, 2))
)


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (TOKENS, WIDTH),
        "visual.proj": (WIDTH, EMBED),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.ln_post.weight": (WIDTH,),
    }
    for linear in LINEARS:
        shape = KINDS[linear.split(".", 4)[-1]]
        found[weight_key(linear)] = shape
        found[bias_key(linear)] = shape[:1]
    for norm in NORMS:
        found[norm.weight] = found[norm.bias] = (WIDTH,)
    return found


def depths() -> dict[str, int]:
    """Where each parameter lies, from -1 before the blocks to their number behind them."""
    outside = {key: BLOCKS if key in BEHIND else -1 for key in shapes()}
    return outside | {key: int(key.split(".")[3]) for key in shapes() if "resblocks" in key}


def _spectral(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers; a matrix gets the decaying spectrum of a fine-tuned one."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) != 2:
        return noise
    U, S, Vh = torch.linalg.svd(noise, full_matrices=False)
    return U @ torch.diag(torch.logspace(0, -1.5, len(S))) @ Vh * 4


class Adapter(dict[str, Tensor]):
    """Weights of an expert whose Linear layers change by products of factors."""

    def __init__(self, base: Weights, seed: int) -> None:
        super().__init__(base)
        random = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        self.pairs = {x.weight: (0.03 * random(len(base[x.weight]), 2), random(2, base[x.weight].shape[1])) for x in INFOS}
        self.update({key: base[key] + up @ down for key, (up, down) in self.pairs.items()})

    def factors(self, key: str) -> tuple[Tensor, Tensor] | None:
        return self.pairs.get(key)


@dataclass
class Zoo:
    """Weights of a backbone and of ``tasks`` experts, and each expert's layer inputs on its proxy images.

    ``layer_inputs[task][linear]`` is ``[images, tokens, d_in]``, handed to observers ``batch`` images at a time. They are made
    up, so that their statistics are under control. As ``inputs().streams`` the zoo runs ``pictures[task]`` through real blocks
    instead, in the precision of the weights that it is given. ``asked`` names the tasks whose proxies were run either way.
    """

    tasks: int
    seed: int = 0
    images: int = 40
    batch: int = 16
    change: float = 1e-2
    base: dict[str, Tensor] = field(init=False)
    experts: dict[str, dict[str, Tensor]] = field(init=False)
    layer_inputs: dict[str, dict[str, Tensor]] = field(init=False)
    pictures: dict[str, Tensor] = field(init=False)
    asked: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        names = [f"task{t}" for t in range(self.tasks)]
        self.base = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes().items()}
        for norm in NORMS:
            self.base[norm.weight] += 1
        self.experts = {
            name: {
                # tasks, and layers of one kind, change by different amounts
                key: value + self.change * (1 + 0.2 * t) * (0.5 + i % 7 / 7) * _spectral(tuple(value.shape), generator)
                for i, (key, value) in enumerate(self.base.items())
            }
            for t, name in enumerate(names)
        }
        self.layer_inputs = {name: {linear: self._activations(linear, generator) for linear in LINEARS} for name in names}
        side = PATCH * round((TOKENS - 1) ** 0.5)
        self.pictures = {name: torch.randn(self.images, 3, side, side, generator=generator) + t for t, name in enumerate(names)}

    def _activations(self, linear: str, generator: torch.Generator) -> Tensor:
        """Correlated, with a mean that dominates, as a transformer's are."""
        d = self.base[weight_key(linear)].shape[1]
        mixing = _spectral((d, d), generator)
        return torch.randn(self.images, TOKENS, d, generator=generator) @ mixing + torch.randn(d, generator=generator)

    def run_proxies(self, task: str, observers: Mapping[str, Observer], model: Merged | None = None) -> None:
        self.asked.add(task)
        for start in range(0, self.images, self.batch):
            for linear, observer in observers.items():
                observer(self.layer_inputs[task][linear][start : start + self.batch])

    def run_backward(self, task: str, observers: Mapping[str, GradientObserver], model: Merged) -> None:
        """Made-up gradients of every layer, batch by batch."""
        self.asked.add(task)
        for start in range(0, self.images, self.batch):
            for linear, observer in observers.items():
                x = self.layer_inputs[task][linear][start : start + self.batch]
                observer(x, self.gradient(task, linear)[start : start + self.batch])

    def gradient(self, task: str, linear: str) -> Tensor:
        """Made-up gradients by a layer's outputs, ``[images, tokens, d_out]``: the expert's outputs on other images."""
        return self.layer_inputs[task][linear].flip(0) @ self.experts[task][weight_key(linear)].T

    def embed(self, task: str, weights: Weights) -> Tensor:
        """The tokens that enter block 0."""
        self.asked.add(task)
        kernel = weights["visual.conv1.weight"]
        patches = F.conv2d(self.pictures[task].to(kernel.dtype), kernel, stride=PATCH).flatten(2).transpose(1, 2)
        first = weights["visual.class_embedding"].expand(len(patches), 1, WIDTH)
        return torch.cat([first, patches], 1) + weights["visual.positional_embedding"]

    def block(self, index: int, weights: Weights, tokens: Tensor, observers: Mapping[str, Observer]) -> Tensor:
        """The tokens that leave a block: attention and MLP, each after a layer normalization and around a shortcut."""
        start = f"visual.transformer.resblocks.{index}"
        assert all(name.startswith(f"{start}.") for name in observers)

        def seen(name: str, x: Tensor) -> Tensor:
            if (name := f"{start}.{name}") in observers:
                observers[name](x)
            return x

        def norm(name: str, x: Tensor) -> Tensor:
            return F.layer_norm(seen(name, x), (WIDTH,), weights[f"{start}.{name}.weight"], weights[f"{start}.{name}.bias"])

        def linear(name: str, x: Tensor) -> Tensor:
            key = f"{start}.{name}"
            return F.linear(seen(name, x), weights[weight_key(key)], weights[bias_key(key)])

        def run(x: Tensor) -> Tensor:
            q, k, v = linear("attn.in_proj", norm("ln_1", x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
            x = x + linear("attn.out_proj", mixed.transpose(1, 2).flatten(2))
            return x + linear("mlp.c_proj", F.gelu(linear("mlp.c_fc", norm("ln_2", x))))

        return torch.cat([run(part) for part in tokens.split(self.batch)])

    def rows(self, task: str, linear: str) -> Tensor:
        """All input rows of a layer, ``[n, d_in]``, float64."""
        return self.layer_inputs[task][linear].flatten(0, 1).double()

    def inputs(self, order: list[int] | None = None) -> MergeInputs:
        names = list(self.experts) if order is None else [list(self.experts)[i] for i in order]
        experts = {name: self.experts[name] for name in names}
        return MergeInputs(
            self.base,
            experts,
            INFOS,
            run_proxies=self.run_proxies,
            norms=NORMS,
            depths=depths(),
            streams=self,
            run_backward=self.run_backward,
        )

    def delta64(self, key: str) -> Tensor:
        """Task vectors ``[T, ...]`` in float64, of the float32 differences."""
        return torch.stack([expert[key] - self.base[key] for expert in self.experts.values()]).double()


def moved(zoo: Zoo, seed: int, size: float) -> Zoo:
    """The same model for formulas, with noise of a ``size`` relative to the norm of every task vector and layer input."""
    generator, other = torch.Generator().manual_seed(seed), copy(zoo)

    def noisy(x: Tensor) -> Tensor:
        return x + size * x.square().mean().sqrt() * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    vars(other).update(
        delta64=lambda key: torch.stack([noisy(delta) for delta in zoo.delta64(key)]),
        rows=lambda task, linear: noisy(zoo.rows(task, linear)),
    )
    return other


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
