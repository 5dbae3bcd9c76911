"""LoRA adapters in the layout of CLIP-LoRA."""

import math
import re

from mergekit_vision.checkpoints.container import Container
from mergekit_vision.checkpoints.lora import Adapter, Update
from mergekit_vision.checkpoints.places import huggingface_place
from mergekit_vision.errors import InputError

_LAYER = re.compile(r"weights\.layer_(\d+)\.(q_proj|k_proj|v_proj|proj)\.w_lora_A")


def clip_lora_adapter(container: Container, scale: float | None) -> Adapter:
    """An adapter in the layout of CLIP-LoRA (Zanella & Ben Ayed, 2024), whose factor is ``alpha / √r``.

    Its layers are numbered among the blocks that were adapted, so that only those of adapters of all blocks can be told.

    Raises:
        InputError: when text blocks were adapted too, or not all blocks.
    """
    told = {name.removeprefix("metadata."): value for name, value in container.values.items() if name.startswith("metadata.")}
    if told.get("encoder") != "vision" or told.get("position") not in ("all", None):
        given = f"encoder {told.get('encoder')!r}, position {told.get('position')!r}"
        raise InputError(
            f"{container.path}: an adapter of CLIP-LoRA with {given}; its layers are numbered among those adapted, and only "
            "adapters of the whole vision tower (encoder vision, position all) can be placed"
        )
    rank, alpha = told.get("r"), told.get("alpha")
    if scale is None and not (isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0):
        raise InputError(f"{container.path}: its metadata lack `r` or `alpha`; give the factor of B A as `scale:`")
    factor = float(alpha) / math.sqrt(rank) if scale is None else scale  # type: ignore[arg-type]
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
    return Adapter(container, updates, {}, {"kind": "lora", "family": "CLIP-LoRA", "scale": scale})
