"""A small made-up encoder with T experts, as merge inputs: the keys, shapes and statistics of a CLIP vision tower."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_vision.merger import LinearInfo, Merged, MergeInputs, Observer

WIDTH, BLOCKS, TOKENS, PATCH, EMBED = 24, 2, 5, 4, 16
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
    return found


def _spectral(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers; a matrix gets the decaying spectrum of a fine-tuned one."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) != 2:
        return noise
    U, S, Vh = torch.linalg.svd(noise, full_matrices=False)
    return U @ torch.diag(torch.logspace(0, -1.5, len(S))) @ Vh * 4


@dataclass
class Zoo:
    """Weights of a backbone and of ``tasks`` experts, and each expert's layer inputs on its proxy images.

    ``layer_inputs[task][linear]`` is ``[images, tokens, d_in]``, handed to observers ``batch`` images at a time.
    """

    tasks: int
    seed: int = 0
    images: int = 40
    batch: int = 16
    change: float = 1e-2
    base: dict[str, Tensor] = field(init=False)
    experts: dict[str, dict[str, Tensor]] = field(init=False)
    layer_inputs: dict[str, dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        names = [f"task{t}" for t in range(self.tasks)]
        self.base = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes().items()}
        self.experts = {
            name: {
                # tasks, and layers of one kind, change by different amounts
                key: value + self.change * (1 + 0.2 * t) * (0.5 + i % 7 / 7) * _spectral(tuple(value.shape), generator)
                for i, (key, value) in enumerate(self.base.items())
            }
            for t, name in enumerate(names)
        }
        self.layer_inputs = {name: {linear: self._activations(linear, generator) for linear in LINEARS} for name in names}

    def _activations(self, linear: str, generator: torch.Generator) -> Tensor:
        """Correlated, with a mean that dominates, as a transformer's are."""
        d = self.base[weight_key(linear)].shape[1]
        mixing = _spectral((d, d), generator)
        return torch.randn(self.images, TOKENS, d, generator=generator) @ mixing + torch.randn(d, generator=generator)

    def run_proxies(self, task: str, observers: Mapping[str, Observer], model: Merged | None = None) -> None:
        for start in range(0, self.images, self.batch):
            for linear, observer in observers.items():
                observer(self.layer_inputs[task][linear][start : start + self.batch])

    def rows(self, task: str, linear: str) -> Tensor:
        """All input rows of a layer, ``[n, d_in]``, float64."""
        return self.layer_inputs[task][linear].flatten(0, 1).double()

    def inputs(self, order: list[int] | None = None) -> MergeInputs:
        names = list(self.experts) if order is None else [list(self.experts)[i] for i in order]
        return MergeInputs(self.base, {name: self.experts[name] for name in names}, INFOS, run_proxies=self.run_proxies)

    def delta64(self, key: str) -> Tensor:
        """Task vectors ``[T, ...]`` in float64, of the float32 differences."""
        return torch.stack([expert[key] - self.base[key] for expert in self.experts.values()]).double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
