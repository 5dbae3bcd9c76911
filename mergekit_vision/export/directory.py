"""A merged model as a directory: open_clip's layout, a record of the merge and a model card."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.encoders.backbone import PREPROCESS_KEYS, Backbone, load_clip
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.export.card import model_card
from mergekit_vision.export.experts import pack_experts, unpack_experts
from mergekit_vision.merger import Weights
from mergekit_vision.routers import LowRankExperts
from mergekit_vision.support.files import replacing
from mergekit_vision.support.json_files import write_json

CONFIG, MODEL, RECORD = "open_clip_config.json", "open_clip_model.safetensors", "merge.json"
EXPERTS, ROUTERS = "experts.safetensors", "experts.json"


def check_output(directory: Path) -> None:
    """Refuse to write a merged model over another model.

    Raises:
        InputError: when ``directory`` is a file, or holds a model that was not merged by this package.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"`default_root_dir` {directory}: is a file; name a directory", of="trainer")
    if (directory / MODEL).exists() and not (directory / RECORD).exists():
        problem = f"holds a model that was not merged here ({MODEL} without {RECORD}); name another"
        raise InputError(f"`default_root_dir` {directory}: {problem}", of="trainer")


def save_model(
    directory: Path, backbone: Backbone, weights: Weights, routed: Mapping[str, LowRankExperts], record: Mapping[str, Any]
) -> None:
    """Write a merged model that ``open_clip.create_model_and_transforms("local-dir:…")`` loads.

    Of a dynamic model open_clip sees the base; its routed experts are files of their own, which :func:`load` reads too.

    Args:
        directory: made when missing; files of an earlier merge are replaced one by one, each whole.
        backbone: whose configuration goes with the weights.
        weights: of the whole CLIP model, the merged vision tower with the backbone's text tower.
        routed: Linear name -> its routed experts; empty for a static model.
        record: what was merged and how; becomes ``merge.json`` and the model card.
    """
    check_output(directory)
    with ExitStack() as drafts:  # all are written, then all renamed

        def draft(name: str) -> Path:
            return drafts.enter_context(replacing(directory / name))

        if routed:
            tensors, routers = pack_experts(routed)
            save_safetensors(draft(EXPERTS), tensors)
            write_json(draft(ROUTERS), routers)
        save_safetensors(draft(MODEL), weights)
        write_json(draft(CONFIG), open_clip_config(backbone))
        draft("README.md").write_text(model_card(record, bool(routed)), encoding="utf-8")
        write_json(draft(RECORD), record)
        save_tokenizer(directory, backbone)
    if not routed:  # experts of an earlier merge do not belong to this one
        for name in (ROUTERS, EXPERTS):
            (directory / name).unlink(missing_ok=True)


def load_experts(directory: Path, allow_code: bool = False) -> dict[str, LowRankExperts]:
    """The routed experts of a dynamic merged model; none for a static one.

    Args:
        directory: of the model.
        allow_code: whether a router class that no installed package registers may be imported.

    Raises:
        InputError: when the experts' two files do not belong together.
    """
    if not (directory / ROUTERS).is_file():
        return {}
    if not (directory / EXPERTS).is_file():
        raise InputError(f"{directory / EXPERTS}: missing, but {ROUTERS} is there; merge again")
    try:
        tensors, routers = load_file(directory / EXPERTS), json.loads((directory / ROUTERS).read_text())
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{directory}: {EXPERTS} or {ROUTERS} is damaged ({error}); merge again") from error
    # in a file tensors start anywhere; matrix products off the usual boundaries in memory may round otherwise
    return unpack_experts({name: tensor.clone() for name, tensor in tensors.items()}, routers, allow_code)


def read_record(directory: Path) -> dict[str, Any]:
    """What ``merge.json`` of a merged model holds.

    Raises:
        InputError: when ``directory`` holds no merged model.
    """
    path = directory / RECORD
    if not path.is_file():
        raise InputError(
            f"{directory}: not a merged model ({RECORD} is missing); make one with the trainer's or the command line's merge"
        )
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); merge again") from error


def load(directory: str | Path, allow_code: bool = False) -> VisionEncoder:
    """A merged vision encoder, ready for ``encode_image``.

    Args:
        directory: written by ``mergekit-vision merge``.
        allow_code: import a router class even if no installed package registers it. Only for models that you trust.

    Returns:
        A plain ``nn.Module`` on the CPU, float32, in evaluation mode.

    Raises:
        InputError: when ``directory`` holds no merged model.
    """
    read_record(Path(directory))
    encoder = VisionEncoder(load_clip(f"local-dir:{directory}").visual).eval()  # type: ignore[arg-type]
    encoder.route(load_experts(Path(directory), allow_code))
    return encoder


def open_clip_config(backbone: Backbone) -> dict[str, Any]:
    """What ``open_clip_config.json`` holds."""
    preprocess = {key: backbone.preprocess[key] for key in PREPROCESS_KEYS}
    return {"model_cfg": dict(backbone.model), "preprocess_cfg": preprocess}


def save_tokenizer(directory: Path, backbone: Backbone) -> None:
    """Save a model's Hugging Face tokenizer, if it has one: open_clip reads that from the model's own directory."""
    if not dict(backbone.model.get("text_cfg", {})).get("hf_tokenizer_name"):
        return
    import open_clip

    open_clip.get_tokenizer(backbone.name).save_pretrained(directory)
