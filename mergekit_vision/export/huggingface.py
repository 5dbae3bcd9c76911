"""``huggingface``: a directory that ``transformers`` loads."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.encoders.backbone import load_tokenizer
from mergekit_vision.export.agreement import largest_difference, relative
from mergekit_vision.export.hf_layout import layout_config, layout_faults, layout_weights
from mergekit_vision.export.hf_processor import write_image_processor, write_tokenizer
from mergekit_vision.export.merged import MergedModel
from mergekit_vision.export.writer import Embed, Writer
from mergekit_vision.support.json_files import write_json

_TEXTS = ["a photo of a cat.", "It's the 3rd of 12 café-owners' signs, isn't it?", "more than fits " * 60]


class HuggingFace(Writer):
    """``CLIPModel`` with both towers, its processor and its tokenizer.

    ``CLIPVisionModelWithProjection``, ``CLIPVisionModel`` and their text siblings load their part of the same directory.
    """

    def faults(self, model: MergedModel) -> list[str]:
        """What ``CLIPModel`` cannot express."""
        return layout_faults(model.backbone)

    def write(self, model: MergedModel, directory: Path) -> None:
        """Write weights, configuration, processor and tokenizer."""
        weights = model.weights()
        config = layout_config(model.backbone, float(weights["logit_scale"]))
        save_safetensors(directory / "model.safetensors", layout_weights(weights, config))
        write_json(directory / "config.json", config)
        write_image_processor(directory, model.backbone.preprocess, model.image_size[0])
        write_tokenizer(directory, config["text_config"]["max_position_embeddings"])

    def load(self, directory: Path) -> Embed:
        """Load both towers, for the vision tower's embeddings."""
        return _images(_load(directory))

    def difference(self, model: MergedModel, directory: Path) -> float:
        """The larger of the images' and the texts' differences."""
        clip = _load(directory)
        return max(largest_difference(_images(clip), model), _text_difference(clip, directory, model))


def _images(clip: Any) -> Embed:
    def embed(images: Tensor) -> Tensor:
        return clip.visual_projection(clip.vision_model(pixel_values=images).pooler_output)  # type: ignore[no-any-return]

    return embed


@torch.no_grad()
def _text_difference(clip: Any, directory: Path, model: MergedModel) -> float:
    """How far the embeddings of some texts lie apart, each tokenized by its own library."""
    from transformers import AutoTokenizer

    texts = AutoTokenizer.from_pretrained(directory)(_TEXTS, padding=True, truncation=True, return_tensors="pt")
    found = clip.text_projection(clip.text_model(**texts).pooler_output)
    expected = cast(Any, model.clip).encode_text(load_tokenizer(model.backbone.name)(_TEXTS))
    return float(relative(found, expected).max())


def _load(directory: Path) -> Any:
    import transformers

    clip: Any = transformers.CLIPModel
    with quiet():
        return clip.from_pretrained(directory, local_files_only=True).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bar and the warnings of future changes that ``transformers`` shows while it loads."""
    from transformers.utils import logging as module

    logging: Any = module
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
