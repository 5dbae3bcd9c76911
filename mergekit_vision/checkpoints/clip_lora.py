"""LoRA adapters in the layout of CLIP-LoRA."""

import math
import re
from collections.abc import Mapping
from typing import Any

from mergekit_vision.checkpoints.container import Container
from mergekit_vision.checkpoints.lora import Adapter, Update, finite
from mergekit_vision.checkpoints.places import huggingface_place
from mergekit_vision.errors import InputError

_LAYER = re.compile(r"weights\.layer_(\d+)\.(q_proj|k_proj|v_proj|proj)\.w_lora_A")
_LETTERS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "o"}


def clip_lora_adapter(container: Container, scale: float | None) -> Adapter:
    """An adapter in the layout of CLIP-LoRA (Zanella & Ben Ayed, 2024), whose factor is ``alpha / √r``.

    Its layers are numbered among the blocks that were adapted, so that only those of adapters of all blocks can be told.

    Raises:
        InputError: when text blocks were adapted too, or not all blocks, or the metadata do not go with the tensors.
    """
    told = {name.removeprefix("metadata."): value for name, value in container.values.items() if name.startswith("metadata.")}
    if told.get("encoder") != "vision" or told.get("position") not in ("all", None):
        given = f"encoder {told.get('encoder')!r}, position {told.get('position')!r}"
        raise InputError(
            f"{container.path}: an adapter of CLIP-LoRA with {given}; its layers are numbered among those adapted, and only "
            "adapters of the whole vision tower (encoder vision, position all) can be placed"
        )
    factor = _factor(container, told) if scale is None else scale
    updates = []
    for name in container.entries:
        layer = _LAYER.fullmatch(name)
        if layer is not None:
            module = "out_proj" if layer[2] == "proj" else layer[2]
            place = huggingface_place(f"encoder.layers.{layer[1]}.self_attn.{module}.weight")
            up = name.removesuffix("A") + "B"
            if place is not None and up in container.entries:
                updates.append(Update(place, name, up, factor))
    if 2 * len(updates) != len(container.entries):
        raise InputError(f"{container.path}: not all of its tensors are factors in CLIP-LoRA's layout")
    _check_layers(container, told.get("params"))
    return Adapter(container, updates, {}, {"kind": "lora", "family": "CLIP-LoRA"})


def _factor(container: Container, told: Mapping[str, Any]) -> float:
    """``alpha / √r`` as the metadata have it, with the rank of the matrices."""
    rank, alpha = told.get("r"), finite(told.get("alpha"))
    if alpha is None or not isinstance(rank, int) or rank < 1:
        raise InputError(
            f"{container.path}: its metadata lack `r` or `alpha`, or `r` is no rank; give the factor of B A as `scale:`"
        )
    odd = next((name for name, info in container.entries.items() if name.endswith("_A") and info.shape[:1] != (rank,)), None)
    if odd is not None:
        shape = container.entries[odd].shape
        raise InputError(
            f"{container.path}: its metadata give the rank {rank}, but {odd} is {shape}; they do not belong together"
        )
    return alpha / math.sqrt(rank)


def _check_layers(container: Container, told: Any) -> None:
    """Check that the adapted layers are those that the metadata name."""
    found = {_LETTERS[layer[2]] for name in container.entries if (layer := _LAYER.fullmatch(name)) is not None}
    if isinstance(told, list | tuple) and set(map(str, told)) != found:
        pair = f"name the layers {', '.join(map(str, told))}, and it holds {', '.join(sorted(found))}"
        raise InputError(f"{container.path}: its metadata {pair}; they do not belong together")
