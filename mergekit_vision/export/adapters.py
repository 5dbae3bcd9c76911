"""Routed experts as LoRA adapters of a CLIP model in the layout of ``transformers``: the same numbers under PEFT's names."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_vision.routers import LowRankExperts

_MODULES = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


class Adapter(NamedTuple):
    """One expert.

    Attributes:
        config: arguments of PEFT's ``LoraConfig``.
        tensors: content of ``adapter_model.safetensors``.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def adapter_names(tasks: Sequence[str]) -> list[str]:
    """A name for each expert that can be a directory's and a module's.

    >>> from mergekit_vision.export.adapters import adapter_names
    >>> adapter_names(["mnist", "../a.b"])
    ['0-mnist', '1-a-b']
    """
    return [f"{index}-{re.sub(r'[^A-Za-z0-9_]+', '-', task).strip('-')}".strip("-") for index, task in enumerate(tasks)]


def modules_of(layer: str) -> list[str]:
    """The Linears of ``transformers`` that a layer of open_clip's is: query, key and value apart.

    >>> from mergekit_vision.export.adapters import modules_of
    >>> modules_of("visual.transformer.resblocks.3.mlp.c_fc")
    ['vision_model.encoder.layers.3.mlp.fc1']
    """
    block, part = re.fullmatch(r"visual\.transformer\.resblocks\.(\d+)\.(.+)", layer).groups()  # type: ignore[union-attr]
    parts = [f"self_attn.{role}_proj" for role in "qkv"] if part == "attn.in_proj" else [_MODULES[part]]
    return [f"vision_model.encoder.layers.{block}.{name}" for name in parts]


def adapter(routed: Mapping[str, LowRankExperts], expert: int) -> Adapter:
    """The adapter of one expert. Added to the base, it computes what the base with that expert in all layers does.

    The matrix of query, key and value is one, so their adapters share ``A`` and have the rows of ``B``. Scaling is 1, because
    ``lora_alpha`` is the rank. Where an expert shifts a layer's bias, the shift is the bias of ``B``.

    Args:
        routed: open_clip's Linear name -> experts.
        expert: index of the expert.
    """
    ranks = {module: experts.ranks[expert] for layer, experts in routed.items() for module in modules_of(layer)}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {module: own for module, own in ranks.items() if own != rank}
    shifted = any(experts.bias is not None for experts in routed.values())
    config = {
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(ranks),
        "rank_pattern": other,
        "alpha_pattern": other,
        "inference_mode": True,
        **({"lora_bias": True} if shifted else {}),
    }
    tensors = {
        f"base_model.model.{module}.{name}": tensor.contiguous().clone()  # a file's tensors share no memory
        for layer, experts in routed.items()
        for module, name, tensor in _parts(layer, experts, expert, shifted)
    }
    return Adapter(config, tensors)


def _parts(layer: str, experts: LowRankExperts, expert: int, shifted: bool) -> Iterator[tuple[str, str, Tensor]]:
    """Module, name and tensor of each factor of a layer; with a bias in all layers if any has one, as PEFT wants it."""
    modules, rank = modules_of(layer), experts.ranks[expert]
    up = experts.up[expert, :, :rank].chunk(len(modules))
    shift = torch.zeros(experts.up.shape[1]) if experts.bias is None else experts.bias[expert]
    for module, rows, bias in zip(modules, up, shift.chunk(len(modules)), strict=True):
        yield module, "lora_A.weight", experts.down[expert, :rank]
        yield module, "lora_B.weight", rows
        if shifted:
            yield module, "lora_B.bias", bias
