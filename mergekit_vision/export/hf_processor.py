"""The processor and the tokenizer of a CLIP model, as ``transformers`` reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_vision.support.json_files import write_json

_START, _END = "<|startoftext|>", "<|endoftext|>"
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


def write_image_processor(directory: Path, preprocess: Mapping[str, Any], side: int) -> None:
    """Write ``preprocessor_config.json``.

    Args:
        directory: where to.
        preprocess: open_clip's ``preprocess_cfg``.
        side: of the images, in pixels.
    """
    square = {"height": side, "width": side}
    crop = preprocess["resize_mode"] == "shortest"
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if crop else square,
        "resample": _RESAMPLE.get(preprocess["interpolation"], _RESAMPLE["bicubic"]),
        "do_center_crop": crop,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }
    write_json(directory / "preprocessor_config.json", content)


def write_tokenizer(directory: Path, context_length: int) -> None:
    """Write the files of ``CLIPTokenizer`` from open_clip's own vocabulary.

    Tokens and their order are the same; the two that begin and end a text have their Hugging Face names.

    Args:
        directory: where to; ``config.json`` is there, by which ``transformers`` knows the kind of tokenizer.
        context_length: of the text tower, to which texts are cut.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import AutoTokenizer

    tokenizer = SimpleTokenizer()
    names = {tokenizer.sot_token_id: _START, tokenizer.eot_token_id: _END}
    vocabulary = {names.get(index, token): index for token, index in tokenizer.encoder.items()}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    write_json(directory / "special_tokens_map.json", special)
    about = {"tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPProcessor", "model_max_length": context_length}
    write_json(directory / "tokenizer_config.json", {**about, "do_lower_case": True, **special})
    # their own conversion: the fast tokenizer then reads one file
    AutoTokenizer.from_pretrained(directory).backend_tokenizer.save(str(directory / "tokenizer.json"))
