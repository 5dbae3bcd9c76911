"""Where the tensors of other libraries' CLIP towers stand in open_clip's."""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """Where a stored tensor belongs.

    Attributes:
        key: of open_clip's parameter.
        third: which third of its rows the tensor is: 0 for the query's, 1 the key's, 2 the value's; ``None`` for all of it.
        transposed: whether rows and columns are exchanged.
    """

    key: str
    third: int | None = None
    transposed: bool = False


def by_key(placed: Iterable[tuple[Place, str]]) -> dict[str, list[tuple[Place, str]]]:
    """Key -> the place and the name in the file of each of its parts, thirds in their order."""
    found: dict[str, list[tuple[Place, str]]] = {}
    for place, name in placed:
        found.setdefault(place.key, []).append((place, name))
    return {key: sorted(parts, key=lambda part: part[0].third or 0) for key, parts in found.items()}


_HF_OUTSIDE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",  # sic
    "pre_layernorm": "ln_pre",
    "post_layernorm": "ln_post",
}
_HF_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+?)(?:\.(weight|bias))?")
_OPEN_CLIP = re.compile(
    r"class_embedding|positional_embedding|proj|conv1\.weight|ln_(?:pre|post)\.(?:weight|bias)"
    r"|transformer\.resblocks\.\d+\.(?:ln_[12]|attn|mlp)\..+"
)
_OPEN_CLIP_LAYER = re.compile(r"(?:visual\.)?transformer\.resblocks\.(\d+)\.(attn|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)")


def huggingface_place(name: str) -> Place | None:
    """Where a tensor of a ``transformers`` CLIP vision tower belongs; ``None`` for none of its parameters.

    Args:
        name: without the prefix ``vision_model.``; ``visual_projection.weight`` as it is.

    >>> huggingface_place("encoder.layers.3.self_attn.k_proj.weight")
    Place(key='visual.transformer.resblocks.3.attn.in_proj_weight', third=1, transposed=False)
    >>> huggingface_place("visual_projection.weight")
    Place(key='visual.proj', third=None, transposed=True)
    """
    if name == "visual_projection.weight":
        return Place("visual.proj", transposed=True)
    if name in _HF_OUTSIDE:
        return Place(f"visual.{_HF_OUTSIDE[name]}")
    owner, _, part = name.rpartition(".")
    if owner in _HF_OUTSIDE:
        return Place(f"visual.{_HF_OUTSIDE[owner]}.{part}")
    layer = _HF_LAYER.fullmatch(name)
    if layer is None or layer[3] is None:
        return None
    block, module, part = f"visual.transformer.resblocks.{layer[1]}", layer[2], layer[3]
    if module in _HF_BLOCK:
        return Place(f"{block}.{_HF_BLOCK[module]}.{part}")
    third = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}.get(module)
    return None if third is None else Place(f"{block}.attn.in_proj_{part}", third)


def huggingface_text_place(name: str) -> Place | None:
    """Where a tensor of the rest of a ``CLIPModel`` belongs, in open_clip's model with both towers; ``None`` for none of it.

    >>> huggingface_text_place("text_model.final_layer_norm.bias").key
    'ln_final.bias'
    """
    if name == "logit_scale":
        return Place("logit_scale")
    if name == "text_projection.weight":
        return Place("text_projection", transposed=True)
    if not name.startswith("text_model."):
        return None
    inside = name.removeprefix("text_model.")
    if inside.startswith("final_layer_norm."):
        return Place(inside.replace("final_layer_norm", "ln_final"))
    if inside == "embeddings.token_embedding.weight":
        return Place("token_embedding.weight")
    place = huggingface_place(inside)
    return None if place is None else place._replace(key=place.key.removeprefix("visual."))


def open_clip_place(name: str) -> Place | None:
    """Where a tensor of open_clip's vision tower alone belongs, named without ``visual.``; ``None`` for none of its parameters.

    >>> open_clip_place("ln_post.bias").key
    'visual.ln_post.bias'
    """
    return Place(f"visual.{name}") if _OPEN_CLIP.fullmatch(name) else None


def linear_place(module: str) -> Place | None:
    """Where the weight of a Linear layer belongs, by the layer's name in either library; ``None`` for no such layer.

    >>> linear_place("vision_model.encoder.layers.0.mlp.fc1").key
    'visual.transformer.resblocks.0.mlp.c_fc.weight'
    >>> linear_place("transformer.resblocks.0.attn").key
    'visual.transformer.resblocks.0.attn.in_proj_weight'
    """
    own = _OPEN_CLIP_LAYER.fullmatch(module)
    if own is not None:
        weight = "attn.in_proj_weight" if own[2] == "attn" else f"{own[2]}.weight"
        return Place(f"visual.transformer.resblocks.{own[1]}.{weight}")
    place = huggingface_place(f"{module.removeprefix('vision_model.')}.weight")
    return place if place is not None and ".ln_" not in place.key and "conv1" not in place.key else None


def bias_of(place: Place) -> Place:
    """Where the bias of the same Linear layer belongs."""
    key = place.key.removesuffix("weight") + "bias"
    return Place(key, place.third)
