"""A CLIP vision tower with plain Linear layers, in which weights are put and experts are routed."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_vision.encoders.attention import LinearAttention
from mergekit_vision.encoders.routed import Route, Routing, attach
from mergekit_vision.merger import LinearInfo, LinearKind, NormInfo, Weights
from mergekit_vision.routers import LowRankExperts

_LINEARS: tuple[tuple[str, LinearKind], ...] = (
    ("attn", "in_proj"),
    ("attn", "out_proj"),
    ("mlp", "c_fc"),
    ("mlp", "c_proj"),
)
"""Owner and kind of the Linear layers of a block, in forward order."""

BEFORE = -1
"""Stands for the index of a block, of what lies before the first one."""


class VisionEncoder(nn.Module):
    """The vision tower of a CLIP model with every projection of its blocks a plain ``nn.Linear``.

    Args:
        visual: an open_clip ``VisionTransformer``; its attention modules are replaced in place (:func:`linearize`).
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = linearize(visual)
        self.routing: Routing | None = None
        self._blocks_ahead = 0

    @property
    def linears(self) -> tuple[LinearInfo, ...]:
        """The Linear layers of the blocks, in forward order."""
        blocks = len(self.visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]
        return tuple(self._describe(block, owner, kind) for block in range(blocks) for owner, kind in _LINEARS)

    def _describe(self, block: int, owner: str, kind: LinearKind) -> LinearInfo:
        name = f"visual.transformer.resblocks.{block}.{owner}.{kind}"
        bias = None if self.get_submodule(name).bias is None else _open_clip_key(f"{name}.bias")
        return LinearInfo(name, _open_clip_key(f"{name}.weight"), bias, kind, block)

    @property
    def norms(self) -> tuple[NormInfo, ...]:
        """The layer normalizations of the blocks, in forward order."""
        blocks = len(self.visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]
        names = [(block, f"visual.transformer.resblocks.{block}.{norm}") for block in range(blocks) for norm in ("ln_1", "ln_2")]
        return tuple(NormInfo(name, f"{name}.weight", f"{name}.bias", block) for block, name in names)

    @property
    def depths(self) -> dict[str, int]:
        """Key of each parameter -> index of its block; -1 before the first block, the number of blocks behind the last."""
        blocks = len(self.visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]
        return {key: _depth(key, blocks) for key in self.weights()}

    def embed(self, images: Tensor) -> Tensor:
        """The tokens that enter block 0, ``[N, L, d]``, of preprocessed images ``[N, 3, H, W]``."""
        return self.visual._embeds(images)  # type: ignore[operator, no-any-return]

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """The tokens that leave a block, ``[N, L, d]``, of those that enter it."""
        return self.visual.transformer.resblocks[index](tokens)  # type: ignore[union-attr, index, operator, no-any-return]

    def weights(self) -> dict[str, Tensor]:
        """The tower's tensors under their open_clip keys, sharing memory with the module."""
        return {_open_clip_key(name): parameter.data for name, parameter in self.named_parameters()}

    def assign(self, weights: Weights, block: int | None = None) -> None:
        """Put in weights by open_clip key, without copying those that are float32 on the module's device already.

        Args:
            weights: all of them, or at least those that are put in.
            block: only those of this block, or :data:`BEFORE` all of them.
        """
        blocks = len(self.visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]
        for name, parameter in self.named_parameters():
            if block is None or _depth(name, blocks) == block:
                parameter.data = weights[_open_clip_key(name)].to(parameter.device, torch.float32)

    def route(self, routed: Mapping[str, LowRankExperts], mode: Route = "router") -> None:
        """Add routed low-rank experts to the named Linear layers; :attr:`routing` then says how they choose."""
        if routed:
            self.routing = attach(self, routed)
            self.routing.mode = mode
            ahead = {name for name, experts in routed.items() if experts.evidence == "ahead"}
            self._blocks_ahead = max((linear.block + 1 for linear in self.linears if linear.name in ahead), default=0)

    def forward(self, images: Tensor) -> Tensor:
        """Image embeddings ``[N, embed_dim]`` of preprocessed images ``[N, 3, H, W]``, not normalized."""
        try:
            if self.routing is not None and self.routing.mode == "router" and self._blocks_ahead:
                self.routing.look_ahead(lambda: self._run_ahead(images))
            features = self.visual(images)
        finally:
            if self.routing is not None:
                self.routing.forget()
        embeddings: Tensor = features[0] if isinstance(features, tuple) else features
        return embeddings

    def _run_ahead(self, images: Tensor) -> None:
        """Run as far as layers decide ahead."""
        tokens = self.embed(images)
        for block in range(self._blocks_ahead):
            tokens = self.run_block(block, tokens)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Image embeddings as open_clip's ``encode_image`` gives them, ``[N, embed_dim]``."""
        features = self(images)
        return F.normalize(features, dim=-1) if normalize else features


def linearize(visual: nn.Module) -> nn.Module:
    """Replace the attention of every block by :class:`LinearAttention`, in place; the output stays the same to 1e-6.

    >>> import open_clip
    >>> from mergekit_vision.encoders.vision import linearize
    >>> tower = open_clip.transformer.VisionTransformer(16, 8, 32, 1, 2, 4.0, output_dim=8)
    >>> linearize(tower).transformer.resblocks[0].attn.in_proj
    Linear(in_features=32, out_features=96, bias=True)
    """
    for block in visual.transformer.resblocks:  # type: ignore[union-attr]
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = LinearAttention.from_multihead(block.attn)
    return visual


def _depth(key: str, blocks: int) -> int:
    """See :attr:`VisionEncoder.depths`."""
    if key.startswith("visual.transformer.resblocks."):
        return int(key.split(".")[3])
    return blocks if key.startswith(("visual.ln_post.", "visual.attn_pool", "visual.proj")) else BEFORE


def _open_clip_key(name: str) -> str:
    """Key of a parameter of the linearized tower in an open_clip checkpoint."""
    return name.replace(".attn.in_proj.", ".attn.in_proj_")
