"""What a checkpoint holds besides a vision tower, or instead of one."""

import re
from collections.abc import Iterable, Mapping

from mergekit_vision.checkpoints.container import TensorInfo
from mergekit_vision.checkpoints.towers import ADAPTED, Tower, plain_names, towers

_TEXT = re.compile(
    r"(?:text\.|text_model\.|text_projection|token_embedding\.|ln_final\.|logit_scale|logit_bias|positional_embedding$"
    r"|transformer\.resblocks\.|attn_mask$|input_resolution$|context_length$|vocab_size$)"
)
"""Beginnings of the names of what a CLIP model holds besides its vision tower."""

_RESUMING = re.compile(r"(?:optimizer|lr_scheduler|scheduler|scaler|loops|callbacks|ema|model_ema|state_dict_ema|n_averaged$)")
"""Beginnings of the names of what a training run keeps to be resumed."""


def unused_names(tower: Tower, entries: Mapping[str, TensorInfo]) -> list[str]:
    """Tensors that are neither of the tower nor of anything that a CLIP model or a training run is known to keep."""
    used = set(tower.names.values())
    others = [other.prefix for other in towers(entries) if other.prefix != tower.prefix]
    unused = []
    for plain, name in plain_names(entries).items():
        inside = plain.removeprefix(tower.parent) if plain.startswith(tower.parent) else plain
        known = _TEXT.match(inside) or inside.endswith(("position_ids", "attn_mask")) or _RESUMING.match(plain)
        known = known or ADAPTED.search(plain)
        if name not in used and not known and not any(plain.startswith(prefix) for prefix in others):
            unused.append(name)
    return unused


def refusal(names: Iterable[str]) -> str:
    """Why a checkpoint without a vision tower cannot be an expert, as far as its names tell."""
    names = list(names)
    if not names:
        return "holds no tensors under names"
    if any(re.search(r"(?:^|\.)params0?\.\d+$", name) for name in names):
        return (
            "is a linearized model, which is the backbone plus a derivative and not a model with other weights; "
            "fine-tune the model itself"
        )
    if any(".lora_" in name or "w_lora_" in name for name in names):
        return "holds LoRA matrices of layers that no vision tower of CLIP has"
    if any(name.startswith("visual.trunk.") or ".trunk." in name for name in names):
        return "holds a tower of timm, and only open_clip's own ViTs are merged"
    if names == [""]:
        return "holds a single tensor without a name, where a fine-tuned vision tower is needed"
    if len(names) <= 4 and all(re.search(r"(?:weight|bias|classifier|head)", name) and not _TEXT.match(name) for name in names):
        return f"holds a classification head ({', '.join(sorted(names))}), where a fine-tuned vision tower is needed"
    return f"holds no vision tower of CLIP: among its tensors ({', '.join(sorted(names)[:4])} …) is no patch embedding"
