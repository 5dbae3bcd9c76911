"""A merged model as a directory: open_clip's layout, a record of the merge and a model card."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.checkpoints.experts import pack_experts, unpack_experts
from mergekit_vision.encoder import PREPROCESS_KEYS, Backbone, VisionEncoder, load_clip
from mergekit_vision.errors import InputError
from mergekit_vision.files import replacing
from mergekit_vision.layers import LowRankExperts
from mergekit_vision.results import model_card, write_json

CONFIG, MODEL, RECORD = "open_clip_config.json", "open_clip_model.safetensors", "merge.json"
EXPERTS, ROUTERS = "experts.safetensors", "experts.json"


def check_output(directory: Path) -> None:
    """Refuse to write a merged model over another model.

    Raises:
        InputError: when ``directory`` is a file, or holds a model that was not merged by this package.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output {directory}: is a file; name a directory")
    if (directory / MODEL).exists() and not (directory / RECORD).exists():
        raise InputError(f"--output {directory}: holds a model that was not merged here ({MODEL} without {RECORD}); name another")


def save_model(directory: Path, backbone: Backbone, encoder: VisionEncoder, record: Mapping[str, Any]) -> None:
    """Write a merged model that ``open_clip.create_model_and_transforms("local-dir:…")`` loads.

    Of a dynamic model open_clip sees the base; its routed experts are files of their own, which :func:`load` reads too.

    Args:
        directory: made when missing; files of an earlier merge are replaced one by one, each whole.
        backbone: whose text tower and configuration go with the merged vision tower.
        encoder: the merged vision tower.
        record: what was merged and how; becomes ``merge.json`` and the model card.
    """
    check_output(directory)
    weights = encoder.weights()
    clip = load_clip(backbone.name, backbone.pretrained)
    state = {key: weights.get(key, value).cpu() for key, value in clip.state_dict().items()}
    preprocess = {key: backbone.preprocess[key] for key in PREPROCESS_KEYS}
    routing = encoder.routing
    with ExitStack() as drafts:  # all are written, then all renamed

        def draft(name: str) -> Path:
            return drafts.enter_context(replacing(directory / name))

        if routing is not None:
            tensors, routers = pack_experts({name: layer.experts for name, layer in routing.layers.items()})
            save_safetensors(draft(EXPERTS), tensors)
            write_json(draft(ROUTERS), routers)
        save_safetensors(draft(MODEL), state)
        write_json(draft(CONFIG), {"model_cfg": dict(backbone.model), "preprocess_cfg": preprocess})
        draft("README.md").write_text(model_card(record, routing is not None), encoding="utf-8")
        write_json(draft(RECORD), record)
        _save_tokenizer(directory, backbone)
    if routing is None:  # experts of an earlier merge do not belong to this one
        for name in (ROUTERS, EXPERTS):
            (directory / name).unlink(missing_ok=True)


def load_experts(directory: Path) -> dict[str, LowRankExperts]:
    """The routed experts of a dynamic merged model; none for a static one.

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
    return unpack_experts(tensors, routers)


def read_record(directory: Path) -> dict[str, Any]:
    """What ``merge.json`` of a merged model holds.

    Raises:
        InputError: when ``directory`` holds no merged model.
    """
    path = directory / RECORD
    if not path.is_file():
        raise InputError(f"{directory}: not a merged model ({RECORD} is missing); make one with `mergekit-vision merge --output`")
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); merge again") from error


def load(directory: str | Path) -> VisionEncoder:
    """A merged vision encoder, ready for ``encode_image``.

    Args:
        directory: written by ``mergekit-vision merge``.

    Returns:
        A plain ``nn.Module`` on the CPU, float32, in evaluation mode.

    Raises:
        InputError: when ``directory`` holds no merged model.
    """
    read_record(Path(directory))
    encoder = VisionEncoder(load_clip(f"local-dir:{directory}").visual).eval()  # type: ignore[arg-type]
    encoder.route(load_experts(Path(directory)))
    return encoder


def _save_tokenizer(directory: Path, backbone: Backbone) -> None:
    """open_clip reads a Hugging Face tokenizer from the model's own directory."""
    if not dict(backbone.model.get("text_cfg", {})).get("hf_tokenizer_name"):
        return
    import open_clip

    open_clip.get_tokenizer(backbone.name).save_pretrained(directory)
