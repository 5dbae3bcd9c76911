"""Configurations of backbones from anyone: a model that runs as its weights were trained, or one message that names the file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hostile.contents import Place, put

from mergekit_vision.encoders.backbone import describe_backbone, load_clip, load_tokenizer
from mergekit_vision.errors import InputError

VISION, TEXT, PIXELS = ("model_cfg", "vision_cfg"), ("model_cfg", "text_cfg"), ("preprocess_cfg",)

REFUSED: dict[str, tuple[Place, Any, str]] = {
    "a norm of text": ((*VISION, "norm_kwargs"), {"eps": "x"}, "norm_kwargs.eps: must be a number, not the str 'x'"),
    "a norm of 0": ((*TEXT, "norm_kwargs"), {"eps": 0.0}, "norm_kwargs.eps: must be greater than 0"),
    "a tower of timm": ((*VISION, "timm_model_name"), "vit_base_patch16_224", "not one of open_clip's own ViTs"),
    "a path as a tower of timm": ((*VISION, "timm_model_name"), "../../x", "Model name '../../x'"),
    "an unknown pooling": ((*VISION, "pool_type"), "x", "open_clip cannot build it (AssertionError); see its"),
    "no pooling": ((*VISION, "pool_type"), "none", "take a backbone with `pool_type` tok or avg"),
    "two poolings": ((*VISION, "attentional_pool"), "parallel", "take a backbone with `attentional_pool` true or false"),
    "a share above 1": ((*VISION, "patch_dropout"), 5, "open_clip cannot build it (AssertionError)"),
    "an unknown key": ((*VISION, "extra"), 3, "unexpected keyword argument 'extra'"),
    "layers beyond all weights": ((*VISION, "mlp_ratio"), 1e9, "but the weights beside it are"),
    "text beyond all weights": ((*TEXT, "mlp_ratio"), 1e9, "but the weights beside it are"),
    "a text tower from above": ((*TEXT, "hf_model_name"), "../../evil", "Repo id must be in the form"),
    "a class token of texts": ((*TEXT, "embed_cls"), True, "`text_cfg.embed_cls` goes with `multimodal_cfg`"),
    "arguments in a list": ((*TEXT, "tokenizer_kwargs"), [1], "tokenizer_kwargs: must be a mapping of arguments"),
    "arguments that are null": ((*TEXT, "tokenizer_kwargs"), None, "tokenizer_kwargs: must be a mapping of arguments"),
    "a shorter context": ((*TEXT, "context_length"), 3, "text_cfg: `context_length` is 3, and the weights have 24"),
    "a longer context": ((*TEXT, "context_length"), 77, "text_cfg: `context_length` is 77, and the weights have 24"),
    "another size of images": (
        (*VISION, "image_size"),
        64,
        "vision_cfg: `image_size` and `patch_size` make 65 tokens of an image, and the weights have 5",
    ),
    "a function for the tokenizer": ((*TEXT, "tokenizer_kwargs"), {"clean": "os.system"}, "Invalid clean function"),
    "images without color": ((*PIXELS, "mode"), "L", "preprocess_cfg.mode: must be 'RGB', not the str 'L'"),
    "a deviation of nothing": ((*PIXELS, "std"), [1e-300] * 3, "must be greater than or equal to 0.001"),
    "a mean beyond float32": ((*PIXELS, "mean"), [1e300] * 3, "must be less than or equal to 1000"),
    "two means": ((*PIXELS, "mean"), [0.5] * 2, "preprocess_cfg.mean: must be three numbers from -1000 to 1000"),
    "a switch that is a number": (("model_cfg", "quick_gelu"), 1, "model_cfg.quick_gelu: must be true or false"),
}


@pytest.fixture
def base(tiny_suite: Path, tmp_path: Path) -> Path:
    """A sound backbone, in a directory of its own."""
    return Path(shutil.copytree(tiny_suite.parent / "base", tmp_path / "base"))


def use_all(name: str) -> None:
    """What a run does with a backbone before it sees an image."""
    for use in (describe_backbone, load_clip, load_tokenizer):
        use(name)


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_fits_no_model(base: Path, case: str) -> None:
    place, value, message = REFUSED[case]
    if "hf_model_name" in place:
        pytest.importorskip("transformers")
    file = base / "open_clip_config.json"
    file.write_text(json.dumps(put(json.loads(file.read_text()), place, value)))
    with pytest.raises(InputError) as caught:
        use_all(f"local-dir:{base}")
    assert str(base) in str(caught.value)
    assert message in str(caught.value)
