"""Backbones of transformers, against its own embeddings of images and texts."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import huggingface_model, images, their_embeddings
from killing import at_once, files_in

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.encoders.backbone import describe_backbone, load_clip, load_tokenizer
from mergekit_vision.encoders.huggingface import as_open_clip
from mergekit_vision.errors import InputError
from mergekit_vision.support.files import CACHE_VARIABLE

transformers = pytest.importorskip("transformers", reason="needs the library transformers")

TOLERANCE = 1e-5  # of float32 embeddings of order 1 through two blocks


@pytest.fixture(params=["quick_gelu", "gelu"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = huggingface_model(activation=request.param)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@torch.no_grad()
def test_embeddings_of_images_and_texts_are_theirs(saved: tuple[Any, Path], cache: Path) -> None:
    theirs, place = saved
    name = f"local-dir:{place}"
    backbone = describe_backbone(name)
    assert backbone.activation == theirs.config.vision_config.hidden_act
    ours: Any = load_clip(name)
    assert torch.allclose(ours.encode_image(images()), their_embeddings(theirs), atol=TOLERANCE)
    tokens = load_tokenizer(name)(["a photo of a cat.", "two words", "longer than " * 12])
    found = theirs.text_projection(theirs.text_model(input_ids=tokens).pooler_output)
    assert torch.allclose(ours.encode_text(tokens), found, atol=TOLERANCE)
    assert float(ours.logit_scale) == float(theirs.logit_scale)
    assert len(list((cache / "backbones").iterdir())) == 1


def test_the_processor_decides_the_preprocessing(saved: tuple[Any, Path]) -> None:
    place = saved[1]
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    assert describe_backbone(f"local-dir:{place}").preprocess["interpolation"] == "bicubic"
    (place / "preprocessor_config.json").write_text(json.dumps({**processor, "do_resize": True}))
    preprocess = describe_backbone(f"local-dir:{place}").preprocess
    assert list(preprocess["mean"]) == [0.1, 0.2, 0.3]
    assert (list(preprocess["std"]), preprocess["interpolation"]) == ([0.4, 0.5, 0.6], "bilinear")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"model_type": "siglip"}, "model_type: must be 'clip'"),
        ({"text_config": {"vocab_size": 100}}, r"text_config\.vocab_size: must be 49408"),
        ({"vision_config": {"hidden_act": "relu"}}, r"vision_config\.hidden_act: must be 'quick_gelu' or 'gelu'"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
        ({"vision_config_dict": {"hidden_size": "wide"}}, r"vision_config\.hidden_size: must be a whole number"),
        ({"vision_config": 3}, "vision_config: must be a mapping"),
    ],
)
def test_what_open_clip_cannot_express_is_refused(tmp_path: Path, change: dict[str, Any], hint: str) -> None:
    huggingface_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    content = json.loads(config.read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if key in content and isinstance(value, dict) else value
    config.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"config\.json: (.|\n)*{hint}"):
        describe_backbone(f"local-dir:{tmp_path}")


def test_a_model_without_a_text_tower_is_no_backbone(tmp_path: Path) -> None:
    model = huggingface_model()
    vision = transformers.CLIPVisionModelWithProjection(model.config.vision_config)
    vision.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks logit_scale, text_projection, .*need a whole CLIPModel"):
        describe_backbone(f"local-dir:{tmp_path}")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_model().save_pretrained(tmp_path / "model")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MERGEKIT_VISION_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be written .*backbone is kept there"):
        describe_backbone(f"local-dir:{tmp_path / 'model'}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
def test_who_waited_for_a_conversion_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_model().save_pretrained(tmp_path / "model")
    converted = tmp_path / "converted"

    def slowly(path: Path, weights: Any) -> None:
        with converted.open("a") as log:
            log.write("once\n")
        time.sleep(1)  # until all have seen that nothing is there
        save_safetensors(path, weights)

    monkeypatch.setattr("mergekit_vision.encoders.huggingface.save_safetensors", slowly)
    at_once(*[lambda: as_open_clip(tmp_path / "model")] * 3)
    assert converted.read_text() == "once\n"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
def test_two_conversions_at_once_are_one(
    saved: tuple[Any, Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several rounds: each process ends with the whole directory, whichever of them wrote it."""
    alone = files_in(as_open_clip(saved[1]))
    for number in range(10):
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / str(number)))

        def convert() -> None:
            assert files_in(as_open_clip(saved[1])) == alone

        at_once(*[convert] * 3)
        (place,) = (tmp_path / str(number) / "backbones").iterdir()
        assert files_in(place) == alone
        assert {path.name for path in place.iterdir()} == alone.keys()
