"""CLIP models in the layout of transformers, against its own classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_vision import InputError
from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.export.exporting import export_model
from mergekit_vision.export.hf_layout import layout_config, layout_faults, layout_weights
from mergekit_vision.export.merged import open_merged

Variant = Callable[..., Path]


def faults(directory: Path) -> list[str]:
    return layout_faults(describe_backbone(f"local-dir:{directory}"))


def test_keys_and_shapes_are_those_of_their_model(variant: Variant) -> None:
    transformers = pytest.importorskip("transformers")
    model = open_merged(variant(), {}, {})
    config = layout_config(model.backbone, 2.5)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**config)).state_dict()
    shapes = {key: value.shape for key, value in theirs.items() if not key.endswith("position_ids")}
    assert {key: value.shape for key, value in layout_weights(model.weights(), config).items()} == shapes


def test_every_key_of_the_configuration_is_written(variant: Variant) -> None:
    transformers = pytest.importorskip("transformers")
    config = layout_config(describe_backbone(f"local-dir:{variant()}"), 2.5)
    general = transformers.PretrainedConfig().to_dict().keys()
    for part, kind in (("vision_config", "CLIPVisionConfig"), ("text_config", "CLIPTextConfig")):
        own = getattr(transformers, kind)().to_dict().keys() - general
        assert own <= config[part].keys(), own - config[part].keys()
        assert all(value is not None for value in config[part].values())
    assert transformers.CLIPConfig().to_dict().keys() - general <= config.keys()


@pytest.mark.parametrize(
    ("vision", "text", "model"),
    [
        ({}, {}, {"quick_gelu": True}),
        ({}, {}, {"custom_text": True}),
        ({"patch_dropout": 0.5, "final_ln_after_pool": True, "mlp_ratio": 3.0}, {"mlp_ratio": 2.0, "output_tokens": True}, {}),
        ({"norm_kwargs": {"eps": 1e-2}}, {"norm_kwargs": {"eps": 1e-3}}, {}),
        ({}, {}, {"preprocess": {"resize_mode": "squash"}}),
    ],
    ids=str,
)
def test_other_configurations(
    vision: dict[str, Any], text: dict[str, Any], model: dict[str, Any], variant: Variant, tmp_path: Path
) -> None:
    """Embeddings of images and of texts agree, or there would be an error."""
    pytest.importorskip("transformers")
    assert export_model(variant(vision, text, **model), "huggingface", tmp_path / "out") < 1e-5


def test_what_it_cannot_express_is_named(variant: Variant) -> None:
    assert faults(variant()) == []
    vision = {"ls_init_value": 0.1, "no_ln_pre": True, "pool_type": "avg", "act_kwargs": {"approximate": "tanh"}}
    text = {"pool_type": "last", "no_causal_mask": True, "proj_bias": True, "vocab_size": 49409}
    found = faults(variant(vision, text, custom_text=True, init_logit_bias=-10.0, preprocess={"resize_mode": "longest"}))
    assert len(found) == 10
    for start in (
        "model_cfg.init_logit_bias is -10.0 (a bias of the logits), which CLIPModel cannot express",
        "vision_cfg.ls_init_value is 0.1 (LayerScale)",
        "vision_cfg.no_ln_pre is True (no normalization before the blocks)",
        "vision_cfg.pool_type is 'avg' (pooling other than by the class or end token)",
        "vision_cfg.act_kwargs is {'approximate': 'tanh'} (an activation other than gelu and quick_gelu)",
        "text_cfg.pool_type is 'last'",
        "text_cfg.no_causal_mask is True (text attention in both directions)",
        "text_cfg.proj_bias is True",
        "text_cfg.vocab_size is 49409 (a vocabulary other than CLIP's)",
        "preprocess_cfg.resize_mode is 'longest' (borders around the image)",
    ):
        assert any(fault.startswith(start) for fault in found), start
    assert faults(variant({"attentional_pool": True, "attn_pooler_heads": 2})) != []
    assert "not square" in faults(variant({"image_size": [16, 24]}))[0]


def test_a_refusal_names_the_model_and_all_reasons(variant: Variant, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"variant: 2 faults\n  .*no_ln_pre.*\n  .*proj_bias"):
        export_model(variant({"no_ln_pre": True}, {"proj_bias": True}, custom_text=True), "huggingface", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_query_key_and_value_are_the_thirds_of_the_input_projection(variant: Variant) -> None:
    pytest.importorskip("transformers")
    model = open_merged(variant(), {}, {})
    weights = model.weights()
    found = layout_weights(weights, layout_config(model.backbone, 2.5))
    thirds = [found[f"vision_model.encoder.layers.1.self_attn.{role}_proj.weight"] for role in "qkv"]
    assert torch.equal(torch.cat(thirds), weights["visual.transformer.resblocks.1.attn.in_proj_weight"])
    assert torch.equal(found["visual_projection.weight"].T, weights["visual.proj"])
