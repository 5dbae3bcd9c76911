"""A CLIP vision tower in and out: load, linearize, put weights in, save."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_vision.errors import InputError
from mergekit_vision.layers import LinearAttention, LowRankExperts, Routing, attach
from mergekit_vision.merger import Merged, Weights

PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")
"""What open_clip stores of a model's preprocessing; the image size comes from the model."""


@dataclass(frozen=True)
class Backbone:
    """What is known of a backbone before its weights are read.

    Attributes:
        name: open_clip model name: built in, ``hf-hub:org/name`` or ``local-dir:path``.
        pretrained: open_clip tag or checkpoint file, for a built-in name.
        model: open_clip's ``model_cfg``.
        preprocess: open_clip's ``preprocess_cfg``, complete.
        shapes: open_clip key of the vision tower -> shape.
    """

    name: str
    pretrained: str | None
    model: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


@lru_cache(maxsize=8)
def describe(name: str, pretrained: str | None = None) -> Backbone:
    """Configuration and vision-tower shapes of a backbone, without reading a weight.

    Raises:
        InputError: for an unknown or incomplete model, a tower that is no open_clip ViT, or an activation function that is
            not the one the pre-trained weights need.
    """
    import open_clip

    _refuse_wrong_activation(name, pretrained)
    with _one_clear_error(name), torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
        preprocess = dict(open_clip.get_model_preprocess_cfg(model))
        config = _model_config(name)
    if pretrained is not None and (tag := open_clip.get_pretrained_cfg(name, pretrained)):
        preprocess.update({key: tag[key] for key in PREPROCESS_KEYS if key in tag})
    _require_vit(name, model)
    shapes = {f"visual.{key}": tuple(value.shape) for key, value in model.visual.state_dict().items()}
    return Backbone(name, pretrained, config, preprocess, shapes)


def load_clip(name: str, pretrained: str | None = None) -> nn.Module:
    """A pre-trained open_clip model in float32 on the CPU, in evaluation mode.

    Raises:
        InputError: as :func:`describe`, or when its weights cannot be had.
    """
    import open_clip

    describe(name, pretrained)
    builtin = not name.startswith(("local-dir:", "hf-hub:"))
    if builtin and pretrained is None:
        raise InputError(f"backbone {name}: add `pretrained:` to the suite (a tag such as `openai`, or a checkpoint file)")
    with _one_clear_error(name):
        model: nn.Module = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
    return model.eval().requires_grad_(False)


class VisionEncoder(nn.Module):
    """The vision tower of a CLIP model with every projection of its blocks a plain ``nn.Linear``.

    Args:
        visual: an open_clip ``VisionTransformer``; its attention modules are replaced in place (:func:`linearize`).
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = linearize(visual)
        self.routing: Routing | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the Linear layers of the blocks, in forward order."""
        order = ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        blocks = len(self.visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]
        return tuple(f"visual.transformer.resblocks.{n}.{kind}" for n in range(blocks) for kind in order)

    def weights(self) -> dict[str, Tensor]:
        """The tower's tensors under their open_clip keys, sharing memory with the module."""
        return {_open_clip_key(name): parameter.data for name, parameter in self.named_parameters()}

    def assign(self, weights: Weights) -> None:
        """Put in weights by open_clip key, without copying those that are float32 on the module's device already."""
        for name, parameter in self.named_parameters():
            parameter.data = weights[_open_clip_key(name)].to(parameter.device, torch.float32)

    def route(self, routed: Mapping[str, LowRankExperts]) -> None:
        """Add routed low-rank experts to the named Linear layers; :attr:`routing` then says how they choose."""
        if routed:
            self.routing = attach(self, routed)

    def forward(self, images: Tensor) -> Tensor:
        """Image embeddings ``[N, embed_dim]`` of preprocessed images ``[N, 3, H, W]``, not normalised."""
        features = self.visual(images)
        embeddings: Tensor = features[0] if isinstance(features, tuple) else features
        return embeddings

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Image embeddings as open_clip's ``encode_image`` gives them, ``[N, embed_dim]``."""
        features = self(images)
        return F.normalize(features, dim=-1) if normalize else features


def linearize(visual: nn.Module) -> nn.Module:
    """Replace the attention of every block by :class:`LinearAttention`, in place; the output stays the same to 1e-6.

    >>> import open_clip
    >>> tower = open_clip.transformer.VisionTransformer(16, 8, 32, 1, 2, 4.0, output_dim=8)
    >>> linearize(tower).transformer.resblocks[0].attn.in_proj
    Linear(in_features=32, out_features=96, bias=True)
    """
    for block in visual.transformer.resblocks:  # type: ignore[union-attr]
        if isinstance(block.attn, nn.MultiheadAttention):
            block.attn = LinearAttention.from_multihead(block.attn)
    return visual


def merged_weights(base: Weights, merged: Merged, scale: float | None = None) -> dict[str, Tensor]:
    """The merged model's weights, ``W_0 + c * update`` with ``c`` the scale, or 1 for fixed keys; float32.

    Args:
        base: pre-trained weights.
        merged: what a merger returned.
        scale: scaling coefficient; ``None`` takes the merger's own.
    """
    weights = {}
    for key, value in base.items():
        update = merged.update.get(key)
        weights[key] = value if update is None else update.mul(merged.coefficient(key, scale)).add_(value.to(update.device))
    return weights


def _open_clip_key(name: str) -> str:
    """Key of a parameter of the linearized tower in an open_clip checkpoint."""
    return name.replace(".attn.in_proj.", ".attn.in_proj_")


def _refuse_wrong_activation(name: str, pretrained: str | None) -> None:
    import open_clip

    if name.startswith(("local-dir:", "hf-hub:")):
        return
    config = open_clip.get_model_config(name)
    if config is None:
        raise InputError(f"backbone {name}: open_clip does not know this model; `open_clip.list_models()` names those it does")
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if not tag and pretrained and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise InputError(f"backbone {name}: pretrained {pretrained!r} is neither a file nor one of its tags ({tags})")
    if tag and bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise InputError(f"backbone {name}: the weights {pretrained!r} were trained with the other GELU; use {other}")


def _model_config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / "open_clip_config.json"
        return dict(json.loads(path.read_text())["model_cfg"])
    if name.startswith("hf-hub:"):
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(name.removeprefix("hf-hub:"), "open_clip_config.json"))
        return dict(json.loads(path.read_text())["model_cfg"])
    return dict(open_clip.get_model_config(name))


def _require_vit(name: str, model: nn.Module) -> None:
    blocks = getattr(getattr(model.visual, "transformer", None), "resblocks", None)
    if blocks is None or not all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks):
        raise InputError(
            f"backbone {name}: its vision tower ({type(model.visual).__name__}) is not one of open_clip's own ViTs; "
            "towers from timm, ResNets and custom attention blocks cannot be merged here"
        )


@contextmanager
def _one_clear_error(name: str) -> Iterator[None]:
    """Turn whatever open_clip raises for a model it cannot make into one line, and keep its log messages out of the way."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except Exception as error:  # whatever kind of file it is, and whatever reads it
        raise InputError(f"backbone {name}: {error}") from error
    finally:
        logging.disable(disabled)
