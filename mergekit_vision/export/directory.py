"""A merged model as a directory: open_clip's layout, a record of the merge and a model card."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.encoders.backbone import PREPROCESS_KEYS, Backbone, load_clip, load_tokenizer
from mergekit_vision.encoders.config import CONFIG
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.export.card import model_card
from mergekit_vision.export.experts import RoutedLayer, pack_experts, unpack_experts
from mergekit_vision.export.manifest import (
    CARD,
    EXPERTS,
    FILES,
    MODEL,
    RECORD,
    ROUTERS,
    check_unchanged,
    files_of,
    read_checked,
    read_record,
    write_record,
)
from mergekit_vision.export.state import State, write_state
from mergekit_vision.merger import Weights
from mergekit_vision.routers import LowRankExperts
from mergekit_vision.support.json_files import write_json
from mergekit_vision.support.switching import replacing_set, unsettled
from mergekit_vision.support.writable import obstacles

_OTHERS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "open_clip_pytorch_model.bin", "config.json")
"""Files of models that others wrote; a merged model beside them would be read in their place."""


def check_output(directory: Path) -> None:
    """Refuse to write a merged model over another model, or where its files cannot be.

    Raises:
        InputError: when ``directory`` is a file, holds files of a model that was not merged by this package, or has directories
            under the names of a model's files.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"`default_root_dir` {directory}: is a file; name a directory", of="trainer")
    foreign = next((name for name in (*FILES, *_OTHERS) if (directory / name).exists()), None)
    if foreign is not None and not ((directory / RECORD).exists() or unsettled(directory)):
        problem = f"holds {foreign} that was not written here ({RECORD} is missing); name another"
        raise InputError(f"`default_root_dir` {directory}: {problem}", of="trainer")
    for fault in obstacles(directory, FILES):
        raise InputError(f"`default_root_dir` {directory}: {fault}", of="trainer")


def check_tokenizer(directory: Path, backbone: Backbone) -> None:
    """Refuse a backbone whose tokenizer cannot be had, or goes by files that are in the directory already and none of a merge's.

    Raises:
        InputError: naming the remedy.
    """
    if _brings_tokenizer(backbone):
        with TemporaryDirectory() as place:
            save_tokenizer(Path(place), backbone)
            _check_names(directory, Path(place))


def _check_names(directory: Path, draft: Path) -> None:
    """Refuse to put files over those of a directory that no merge has written."""
    own = {*FILES, *files_of(directory)}
    foreign = sorted(file.name for file in draft.iterdir() if file.name not in own and (directory / file.name).exists())
    if foreign:
        problem = f"holds {foreign[0]}, a name that the model's tokenizer has too, and which was not written here"
        raise InputError(f"`default_root_dir` {directory}: {problem}; move it, or name another directory", of="trainer")


def save_model(
    directory: Path,
    backbone: Backbone,
    weights: Weights,
    routed: Mapping[str, LowRankExperts],
    record: Mapping[str, Any],
    state: State | None = None,
    former: Mapping[str, Any] | None = None,
) -> None:
    """Write a merged model that ``open_clip.create_model_and_transforms("local-dir:…")`` loads.

    Of a dynamic model open_clip sees the base; its routed experts are files of their own, which :func:`load` reads too.

    Args:
        directory: made when missing. An earlier merge in it is replaced in one step; files that are none of its are left alone.
        backbone: whose configuration goes with the weights.
        weights: of the whole CLIP model, the merged vision tower with the backbone's text tower.
        routed: Linear name -> its routed experts; empty for a static model.
        record: what was merged and how; becomes ``merge.json`` and the model card.
        state: what was kept for experts that join or leave later.
        former: record of the model in the directory that this one was made from and replaces.

    Raises:
        InputError: when the files cannot be written, or the directory has another model than ``former`` by now, or files of
            others under names of the tokenizer's. What is there stays then.
    """
    check_output(directory)
    try:
        with replacing_set(directory, lambda: {*FILES, *files_of(directory)}, deciding=RECORD) as draft:
            if former is not None:  # looked at while no other process can write here
                check_unchanged(directory, former)
            _write(draft, backbone, weights, routed, record, state)
            _check_names(directory, draft)
    except (OSError, SafetensorError) as error:
        tensors = [*weights.values(), *(state.tensors.values() if state else ())]
        size = sum(value.nbytes for value in tensors) / 1e6
        reason = getattr(error, "strerror", None) or error
        problem = f"the model cannot be written ({reason}); it takes {size:.0f} MB more, and what was there before is unchanged"
        raise InputError(f"`default_root_dir` {directory}: {problem}", of="trainer") from error


def _write(
    draft: Path,
    backbone: Backbone,
    weights: Weights,
    routed: Mapping[str, LowRankExperts],
    record: Mapping[str, Any],
    state: State | None,
) -> None:
    """Write the files of a model into an empty folder, the one that lists them last."""
    if routed:
        tensors, routers = pack_experts(routed)
        save_safetensors(draft / EXPERTS, tensors)
        write_json(draft / ROUTERS, routers)
    if state:
        write_state(draft, state, record)
    save_safetensors(draft / MODEL, weights)
    write_json(draft / CONFIG, open_clip_config(backbone))
    (draft / CARD).write_text(model_card(record, bool(routed)), encoding="utf-8")
    save_tokenizer(draft, backbone)
    write_record(draft, record)


def load_experts(directory: Path, allow_code: bool = False) -> dict[str, LowRankExperts]:
    """The routed experts of a dynamic merged model; none for a static one.

    Args:
        directory: of the model.
        allow_code: whether a router class that no installed package registers may be imported.

    Raises:
        InputError: when the experts' two files do not belong together, or hold what cannot be run.
    """
    if not any((directory / name).exists() for name in (ROUTERS, EXPERTS)):
        return {}
    for name in (ROUTERS, EXPERTS):
        if not (directory / name).is_file():
            raise InputError(f"{directory / name}: missing, but the other file of the experts is there; merge again")
    routers = read_checked(directory / ROUTERS, dict[str, RoutedLayer])
    try:
        tensors = load_file(directory / EXPERTS)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{directory / EXPERTS}: is damaged ({error}); merge again") from error
    try:
        # in a file tensors start anywhere; matrix products off the usual boundaries in memory may round otherwise
        return unpack_experts({name: tensor.clone() for name, tensor in tensors.items()}, routers, allow_code)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error


def load(directory: str | Path, allow_code: bool = False, verify: bool = True) -> VisionEncoder:
    """A merged vision encoder, ready for ``encode_image``.

    Args:
        directory: written by ``mergekit-vision merge``.
        allow_code: import a router class even if no installed package registers it. Only for models that you trust.
        verify: compare every file with the checksum that was recorded when it was written.

    Returns:
        A plain ``nn.Module`` on the CPU, float32, in evaluation mode. Experts that were stored in bfloat16 remain so in memory.

    Raises:
        InputError: when ``directory`` holds no merged model, or one that is not as it was written.
    """
    record = read_record(Path(directory), verify)
    encoder = VisionEncoder(load_clip(f"local-dir:{directory}").visual).eval()  # type: ignore[arg-type]
    encoder.route(load_experts(Path(directory), allow_code))
    check_unchanged(Path(directory), record)
    return encoder


def open_clip_config(backbone: Backbone) -> dict[str, Any]:
    """What ``open_clip_config.json`` holds."""
    preprocess = {key: backbone.preprocess[key] for key in PREPROCESS_KEYS}
    if backbone.preprocess["fill_color"] != 0:  # open_clip's own files lack it: it is 0 of all its models
        preprocess["fill_color"] = backbone.preprocess["fill_color"]
    return {"model_cfg": dict(backbone.model), "preprocess_cfg": preprocess}


def save_tokenizer(directory: Path, backbone: Backbone) -> None:
    """Save a model's Hugging Face tokenizer, if it has one: open_clip reads that from the model's own directory.

    Raises:
        InputError: when it cannot be had.
    """
    if _brings_tokenizer(backbone):
        cast(Any, load_tokenizer(backbone.name)).save_pretrained(directory)


def _brings_tokenizer(backbone: Backbone) -> bool:
    return bool(dict(backbone.model.get("text_cfg", {})).get("hf_tokenizer_name"))
