"""Backbones of transformers, against its own embeddings of images and texts."""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from clip_models import SIZES, huggingface_model, images, their_embeddings
from killing import at_once, files_in
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.data.preprocess import eval_transform
from mergekit_vision.encoders.backbone import describe_backbone, load_clip, load_tokenizer
from mergekit_vision.encoders.huggingface import as_open_clip
from mergekit_vision.errors import InputError
from mergekit_vision.export.hf_processor import write_image_processor, write_tokenizer
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


def processed_alike(place: Path) -> bool:
    """Whether images of several shapes become the same pixels by a backbone's preprocessing as by transformers' own."""
    preprocess = eval_transform(describe_backbone(f"local-dir:{place}").preprocess)
    processor = transformers.CLIPImageProcessor.from_pretrained(place)
    # resizing rounds to the next of 255 levels, either way; of margins to crop, an odd pixel is left on either side
    noise = np.random.RandomState(0)
    images = [Image.fromarray(noise.randint(256, size=(*shape, 3), dtype=np.uint8)) for shape in [(30, 20), (16, 40), (16, 16)]]
    found = torch.stack([preprocess.finish(preprocess.geometry(image)) for image in images])
    expected = torch.stack([torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"][0]) for image in images])
    return bool(((found - expected).abs() * preprocess.std * 255).max() < 1.5)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_exported_processor_is_read_back(tmp_path: Path, resize_mode: str, interpolation: str) -> None:
    huggingface_model().save_pretrained(tmp_path)
    ours = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": resize_mode, "interpolation": interpolation}
    write_image_processor(tmp_path, ours, side=SIZES["image"])
    found = describe_backbone(f"local-dir:{tmp_path}").preprocess
    assert {key: list(found[key]) if key in ("mean", "std") else found[key] for key in ours} == ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False},
        {"size": {"height": 16, "width": 16}, "do_center_crop": False},
        {"size": {"height": 16, "width": 16}},
        {"size": {"height": 16, "width": 16}, "do_center_crop": False, "crop_size": {"height": 9, "width": 9}},
    ],
    ids=str,
)
def test_images_are_prepared_as_by_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    huggingface_model().save_pretrained(tmp_path)
    shared = {"size": 16, "crop_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    transformers.CLIPImageProcessor(**{**shared, **options}).save_pretrained(tmp_path)
    assert processed_alike(tmp_path)


def test_a_processor_is_found_where_transformers_puts_it(tmp_path: Path) -> None:
    huggingface_model().save_pretrained(tmp_path)
    write_tokenizer(tmp_path, context_length=12)
    theirs = transformers.CLIPImageProcessor(size=16, crop_size=16, image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=2)
    transformers.CLIPProcessor(theirs, transformers.AutoTokenizer.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    found = describe_backbone(f"local-dir:{tmp_path}").preprocess
    assert (list(found["mean"]), list(found["std"]), found["interpolation"]) == ([0.5] * 3, [0.25] * 3, "bilinear")


@pytest.mark.parametrize(
    ("together", "mean"),
    [
        ({"processor_class": "CLIPProcessor"}, 0.2),
        ({"image_processor": None}, 0.2),
        ({"image_processor": {"image_mean": [0.1] * 3}}, 0.1),
    ],
    ids=str,
)
def test_of_two_processors_that_of_the_whole_counts(tmp_path: Path, together: dict[str, Any], mean: float) -> None:
    """As with :func:`transformers.models.auto.image_processing_auto.get_image_processor_config`."""
    huggingface_model().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.2] * 3}))
    assert list(describe_backbone(f"local-dir:{tmp_path}").preprocess["mean"]) == [0.2] * 3
    (tmp_path / "processor_config.json").write_text(json.dumps(together))
    assert list(describe_backbone(f"local-dir:{tmp_path}").preprocess["mean"]) == [mean] * 3


@pytest.mark.parametrize(
    ("processor", "hint"),
    [
        ({"do_resize": False}, "do_resize: must be true "),
        ({"do_rescale": False}, "do_rescale: must be true "),
        ({"rescale_factor": 1}, "rescale_factor: must be 1/255 "),
        ({"do_center_crop": False}, r'`do_center_crop` False .* write {"size": {"shortest_edge": 16}, .* or, to squash'),
        ({"do_center_crop": False, "size": {"height": 16, "width": 8}}, r"`size` {'height': 16, 'width': 8}"),
        ({"size": {"shortest_edge": 20}, "crop_size": 16}, r"`size` {'shortest_edge': 20}"),
        ({"size": 16, "crop_size": 8}, "`crop_size` 8 "),
        ({"size": {"height": 16, "width": 16}, "crop_size": 8}, "`crop_size` 8 "),
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_processor_that_open_clip_cannot_express_is_refused(
    tmp_path: Path, processor: dict[str, Any], hint: str, nested: bool
) -> None:
    huggingface_model().save_pretrained(tmp_path)
    file = tmp_path / ("processor_config.json" if nested else "preprocessor_config.json")
    file.write_text(json.dumps({"image_processor": processor} if nested else processor))
    with pytest.raises(InputError, match=rf"^{file}: (.|\n)*{hint}"):
        describe_backbone(f"local-dir:{tmp_path}")


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


def test_revisions_that_share_an_index_are_told_apart(tmp_path: Path) -> None:
    """As the hub's cache keeps them: what is alike in two revisions is one file."""
    first, second = tmp_path / "first", tmp_path / "second"
    huggingface_model().save_pretrained(first, max_shard_size="100KB")
    second.mkdir()
    for file in first.iterdir():
        tensors = load_file(file) if file.suffix == ".safetensors" else {}
        if "logit_scale" in tensors:
            save_file({**tensors, "logit_scale": torch.tensor(3.0)}, second / file.name, {"format": "pt"})
        else:
            (second / file.name).symlink_to(file)
    assert (second / "model.safetensors.index.json").is_symlink()
    found = [load_clip(f"local-dir:{place}").logit_scale for place in (first, second)]
    assert found == [huggingface_model().logit_scale, 3.0]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left on device")])
def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def failing(*_: object) -> NoReturn:
        raise error

    huggingface_model().save_pretrained(tmp_path)
    monkeypatch.setattr("mergekit_vision.encoders.huggingface.save_safetensors", failing)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); the backbone is kept there"):
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
