"""Checkpoints of transformers, made by transformers, against its own embeddings."""

import json
from pathlib import Path

import pytest
import torch
from clip_models import embeddings, huggingface_model, open_clip_tower, their_embeddings
from safetensors.torch import load_file, save_file

from mergekit_vision.checkpoints import open_weights
from mergekit_vision.errors import InputError

transformers = pytest.importorskip("transformers", reason="needs the library transformers")

TOLERANCE = 1e-5  # of float32 embeddings of order 1 through two blocks


@pytest.fixture(scope="module")
def theirs() -> "transformers.CLIPModel":
    return huggingface_model()


def vision_part(model: "transformers.CLIPModel", kind: str) -> "transformers.PreTrainedModel":
    part = getattr(transformers, kind)(model.config.vision_config)
    own = {name: value for name, value in model.state_dict().items() if name in part.state_dict()}
    if not own:  # newer versions name the tower of a CLIPVisionModel without the prefix
        own = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
        own = {name: value for name, value in own.items() if name in part.state_dict()}
    part.load_state_dict(own)
    return part


def test_a_clip_model_directory_is_its_own_model(theirs: "transformers.CLIPModel", tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    expert = open_weights(tmp_path)
    assert expert.origin == {
        "kind": "weights",
        "family": "huggingface",
        "names": "vision_model.*",
        "activation": "quick_gelu",
        "container": "safetensors",
    }
    assert expert.shapes == {f"visual.{key}": tuple(value.shape) for key, value in open_clip_tower().state_dict().items()}
    assert torch.allclose(embeddings(expert), their_embeddings(theirs), atol=TOLERANCE)


def test_all_classes_and_both_generations_of_names(theirs: "transformers.CLIPModel", tmp_path: Path) -> None:
    expected, base = their_embeddings(theirs), huggingface_model(seed=7)
    base.save_pretrained(tmp_path / "base")
    backbone = dict(open_weights(tmp_path / "base"))
    backbone["visual.proj"] = theirs.visual_projection.weight.detach().T
    for kind in ("CLIPVisionModelWithProjection", "CLIPVisionModel"):
        vision_part(theirs, kind).save_pretrained(tmp_path / kind)
        for prefix in ("", "vision_model.", "clip.vision_model."):
            state = {
                prefix + name.removeprefix("vision_model."): value
                for name, value in load_file(tmp_path / kind / "model.safetensors").items()
                if name != "visual_projection.weight"
            }
            if kind == "CLIPVisionModelWithProjection":
                state[prefix.removesuffix("vision_model.") + "visual_projection.weight"] = (
                    theirs.visual_projection.weight.detach()
                )
            save_file(state, tmp_path / "x.safetensors")
            expert = open_weights(tmp_path / "x.safetensors")
            assert ("projection" in expert.origin) == (kind == "CLIPVisionModel")
            assert torch.allclose(embeddings(expert.on(backbone)), expected, atol=TOLERANCE)


def test_the_projection_of_a_model_with_two_encoders_is_found(theirs: "transformers.CLIPModel", tmp_path: Path) -> None:
    state = {f"vision_model.{name}" if name.startswith("vision") else name: value for name, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "x.pt")
    expert = open_weights(tmp_path / "x.pt")
    assert "projection" not in expert.origin
    assert torch.allclose(embeddings(expert), their_embeddings(theirs), atol=TOLERANCE)


def test_shards_and_pickles(theirs: "transformers.CLIPModel", tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    theirs.config.save_pretrained(tmp_path / "pickled")
    torch.save(theirs.state_dict(), tmp_path / "pickled" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for name in ("sharded", "pickled"):
        assert torch.allclose(embeddings(open_weights(tmp_path / name)), their_embeddings(theirs), atol=TOLERANCE)
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for spoiled, hint in (("../x.safetensors", "not one of weights beside it"), ("gone.safetensors", "cannot be read")):
        name = next(iter(content["weight_map"]))
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], name: spoiled}}))
        with pytest.raises(InputError, match=hint):
            open_weights(tmp_path / "sharded")


def test_mixed_precision_is_read_as_it_is_stored(theirs: "transformers.CLIPModel", tmp_path: Path) -> None:
    state = {
        name: value if "norm" in name else value.half()
        for name, value in theirs.state_dict().items()
        if value.is_floating_point()
    }
    save_file(state, tmp_path / "x.safetensors")
    expert = open_weights(tmp_path / "x.safetensors")
    assert expert["visual.proj"].dtype == torch.float16
    assert expert["visual.ln_pre.weight"].dtype == torch.float32
    half = float(torch.finfo(torch.float16).eps)
    assert torch.allclose(embeddings(expert), their_embeddings(theirs), atol=10 * half)


def test_other_models_of_transformers_are_refused(tmp_path: Path) -> None:
    config = huggingface_model().config
    transformers.CLIPForImageClassification(config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(InputError, match="CLIPForImageClassification"):
        open_weights(tmp_path / "classifier")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = transformers.SiglipVisionConfig(**vision, image_size=16, patch_size=8)
    transformers.SiglipVisionModel(siglip).save_pretrained(tmp_path / "siglip")
    with pytest.raises(InputError, match=r"config\.json: is of a 'siglip_vision_model' model, not of CLIP"):
        open_weights(tmp_path / "siglip")


def test_attention_in_pieces_must_be_whole(theirs: "transformers.CLIPModel", tmp_path: Path) -> None:
    state = {name: value for name, value in theirs.state_dict().items() if not name.endswith("position_ids")}
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"q_proj\.bias, .*v_proj\.bias are not query, key and value together"):
        open_weights(tmp_path / "x.safetensors")
