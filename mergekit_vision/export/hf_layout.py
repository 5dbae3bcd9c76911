"""A CLIP model in the layout of Hugging Face's ``transformers``: what it can express, its configuration and its keys."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mergekit_vision.checkpoints.places import Place, huggingface_place, huggingface_text_place
from mergekit_vision.encoders.backbone import Backbone

VOCABULARY = 49408
"""Tokens of CLIP's vocabulary; the last two begin and end a text."""

_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "cast_dtype", "output_dict"}
_VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "pos_embed_type"}
_TEXT = {"layers", "width", "heads", "mlp_ratio", "context_length", "hf_model_pretrained", "pad_id", "eos_id"}
# to drop patches is for training; to normalize the pooled token is to normalize all tokens and pool one
_BOTH = {"output_tokens", "patch_dropout", "final_ln_after_pool", "norm_kwargs"}
_MEANING = {
    "act_kwargs": "an activation other than gelu and quick_gelu",
    "attentional_pool": "attentional pooling",
    "embed_cls": "a class token of the text",
    "hf_model_name": "a text tower of another architecture",
    "hf_tokenizer_name": "a tokenizer other than CLIP's",
    "init_logit_bias": "a bias of the logits",
    "ls_init_value": "LayerScale",
    "multimodal_cfg": "a text decoder",
    "no_causal_mask": "text attention in both directions",
    "no_ln_pre": "no normalization before the blocks",
    "nonscalar_logit_scale": "a logit scale that is no scalar",
    "pool_type": "pooling other than by the class or end token",
    "proj_bias": "a text projection with a bias",
    "proj_type": "no linear text projection",
    "tokenizer_kwargs": "a tokenizer other than CLIP's",
    "vocab_size": "a vocabulary other than CLIP's",
}


def layout_faults(backbone: Backbone) -> list[str]:
    """What of a model ``CLIPModel`` and its processor cannot express, by the keys of open_clip's configuration."""
    return [f"{key} is {value!r} ({meaning}), which CLIPModel cannot express" for key, value, meaning in _unusual(backbone)]


def _unusual(backbone: Backbone) -> Iterator[tuple[str, Any, str]]:
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    config, preprocess = backbone.model, backbone.preprocess
    for key in config.keys() - _MODEL:
        if config[key] not in (None, False):
            yield f"model_cfg.{key}", config[key], _MEANING.get(key, "unknown there")
    for part, kind, known in (("vision_cfg", CLIPVisionCfg, _VISION), ("text_cfg", CLIPTextCfg, _TEXT)):
        defaults = {field.name: field.default for field in fields(kind)}
        for key, value in config[part].items():
            if key not in known | _BOTH and value != defaults.get(key):
                yield f"{part}.{key}", value, _MEANING.get(key, "unknown there")
        if norm := (config[part].get("norm_kwargs") or {}).keys() - {"eps"}:
            yield f"{part}.norm_kwargs", sorted(norm), "another layer normalization"
    for key in ("image_size", "patch_size"):
        if len(set(_both(config["vision_cfg"].get(key)))) > 1:
            yield f"vision_cfg.{key}", config["vision_cfg"][key], "not square"
    if preprocess["resize_mode"] not in ("shortest", "squash"):
        yield "preprocess_cfg.resize_mode", preprocess["resize_mode"], "borders around the image"


def _both(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def layout_config(backbone: Backbone, logit_scale: float) -> dict[str, Any]:
    """The content of ``config.json``, with every key: absent ones would take defaults that have changed over the years.

    Args:
        backbone: without :func:`layout_faults`.
        logit_scale: the model's, a logarithm.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    model = backbone.model
    vision, text = CLIPVisionCfg(**model["vision_cfg"]), CLIPTextCfg(**model["text_cfg"])
    both = {"hidden_act": backbone.activation, "projection_dim": model["embed_dim"]}
    end = VOCABULARY - 1
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "logit_scale_init_value": logit_scale,
        "initializer_factor": 1.0,
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "clip_vision_model",
            **_tower(vision, vision.width // vision.head_width),
            **both,
            "image_size": _both(vision.image_size)[0],
            "patch_size": _both(vision.patch_size)[0],
            "num_channels": 3,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **_tower(text, text.heads),
            **both,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": text.context_length,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    }


def _tower(config: Any, heads: int) -> dict[str, Any]:
    """What both towers have, from open_clip's configuration of one."""
    return {
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "layer_norm_eps": (config.norm_kwargs or {}).get("eps", 1e-5),
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
    }


def layout_weights(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of a whole CLIP model under the keys of ``CLIPModel``; the same numbers, query, key and value apart.

    Args:
        weights: by open_clip key; the text tower's begin with ``text.``, or with nothing.
        config: of :func:`layout_config`.
    """
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        names = CLIPModel(CLIPConfig(**config)).state_dict()
    plain = {key.removeprefix("text."): value for key, value in weights.items()}
    places = {name: huggingface_text_place(name) or huggingface_place(name.removeprefix("vision_model.")) for name in names}
    return {name: _part(plain[place.key], place) for name, place in places.items() if place is not None}


def _part(value: Tensor, place: Place) -> Tensor:
    """The part of a parameter that has a name of its own there, as it lies there."""
    part = value if place.third is None else value.chunk(3)[place.third]
    return part.T if place.transposed else part
