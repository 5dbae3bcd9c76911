"""CLIP models of the library transformers as backbones: turned into open_clip's layout once, in the cache directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from safetensors import SafetensorError

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.checkpoints.clip_config import older_first
from mergekit_vision.checkpoints.container import Container
from mergekit_vision.checkpoints.hub import named_shards
from mergekit_vision.checkpoints.opening import open_container, weights_file
from mergekit_vision.checkpoints.places import by_key, huggingface_place, huggingface_text_place
from mergekit_vision.checkpoints.weights import CheckpointWeights
from mergekit_vision.encoders.config import CONFIG
from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import raise_faults
from mergekit_vision.support.files import cache_dir
from mergekit_vision.support.fingerprints import digest, stamp
from mergekit_vision.support.json_files import read_json, to_json, write_json
from mergekit_vision.support.schema import Schema, brief, faults
from mergekit_vision.support.switching import replacing_set

_FORMAT = 2  # of what is kept in the cache
_CONVERSION = 600.0  # seconds that another process may take to convert a large model on a slow disk
WEIGHTS = "open_clip_model.safetensors"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")  # the first where it has an image processor, as transformers
_INTERPOLATION = {2: "bilinear", 3: "bicubic"}
_OPENAI_MEAN, _OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

_Size = Annotated[int, Field(ge=1, le=1 << 16)]
_Three = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Open(Schema):
    """A mapping of which transformers knows more keys; absent ones have its defaults, as it writes differences alone."""

    model_config = ConfigDict(extra="ignore")

    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    num_hidden_layers: Annotated[int, Field(ge=1, le=1000)] = 12


class _Vision(_Open):
    hidden_size: _Size = 768
    intermediate_size: _Size = 3072
    num_attention_heads: _Size = 12
    image_size: _Size = 224
    patch_size: _Size = 32
    num_channels: Literal[3] = 3


class _Text(_Open):
    hidden_size: _Size = 512
    intermediate_size: _Size = 2048
    num_attention_heads: _Size = 8
    vocab_size: Literal[49408] = 49408  # of CLIP's tokenizer, the only one that goes with these models
    max_position_embeddings: _Size = 77
    eos_token_id: Literal[2, 49407] = 49407  # 2 is an old mistake, under which the largest index is looked for


class _Clip(Schema):
    model_config = ConfigDict(extra="ignore")

    model_type: Literal["clip"]
    projection_dim: _Size = 512
    vision_config: _Vision = _Vision()
    text_config: _Text = _Text()


class _Processor(Schema):
    model_config = ConfigDict(extra="ignore")

    image_mean: _Three = _OPENAI_MEAN
    image_std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] = _OPENAI_STD
    resample: Literal[2, 3] = 3
    do_resize: Literal[True] = Field(default=True, description="true (open_clip resizes every image)")
    do_rescale: Literal[True] = Field(default=True, description="true (open_clip has pixels in [0, 1])")
    rescale_factor: float = Field(default=1 / 255, ge=0.00392, le=0.003922, description="1/255 (open_clip has pixels in [0, 1])")
    do_normalize: bool | None = True
    do_center_crop: bool | None = True
    size: Any = None
    crop_size: Any = None

    def resize_mode(self, side: int) -> str | None:
        """open_clip's word for how images become squares of ``side`` pixels; ``None`` where it has none. Absent sizes fit."""
        square = {"height": side, "width": side}
        fitting = self.crop_size in (None, side, square)
        if self.size == square and (fitting or not self.do_center_crop):
            return "squash"
        if self.size in (None, side, {"shortest_edge": side}) and fitting and self.do_center_crop:
            return "shortest"
        return None


class _Processors(Schema):
    model_config = ConfigDict(extra="ignore")

    image_processor: _Processor | None = None


def is_huggingface(directory: Path) -> bool:
    """Whether a model directory is in the layout of transformers and not in open_clip's."""
    return (directory / "config.json").is_file() and not (directory / CONFIG).is_file()


def as_open_clip(directory: Path) -> Path:
    """The directory of the same model in open_clip's layout, made in the cache directory where it is not there yet.

    Raises:
        InputError: when it is not a whole CLIP model, open_clip cannot express it, or the cache cannot be written.
    """
    config = _checked(_Clip, directory / "config.json")
    preprocess = _preprocess_config(directory, config.vision_config.image_size)
    weights = weights_file(directory)
    described = [directory / name for name in ("config.json", *_PROCESSORS)]
    # revisions of a repository may share the index, which is one file in the hub's cache
    shards = [weights.parent / shard for shard in sorted(named_shards(weights))]
    files = [file for file in (*described, weights, *shards) if file.is_file()]
    place = cache_dir() / "backbones" / digest(_FORMAT, [stamp(file.resolve()) for file in files])
    if not (place / CONFIG).is_file():
        _write(place, _model_config(config, directory), preprocess, _weights(open_container(weights)))
    return place


def _checked(schema: type[Schema], path: Path) -> Any:
    content = older_first(read_json(path)) if path.is_file() else {}
    raise_faults(path, faults(schema, content, "the file"))
    return schema.model_validate(content)


def _model_config(config: _Clip, directory: Path) -> dict[str, Any]:
    vision, text = config.vision_config, config.text_config
    if vision.hidden_act != text.hidden_act or {vision.layer_norm_eps, text.layer_norm_eps} != {1e-5}:
        raise InputError(
            f"{directory / 'config.json'}: open_clip has one activation function for both towers, and layer_norm_eps 1e-5; "
            f"here are {vision.hidden_act} and {text.hidden_act}, {vision.layer_norm_eps:g} and {text.layer_norm_eps:g}"
        )
    for part in (vision, text):
        if part.hidden_size % part.num_attention_heads:
            sizes = f"hidden_size {part.hidden_size} is no multiple of num_attention_heads {part.num_attention_heads}"
            raise InputError(f"{directory / 'config.json'}: {sizes}")
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }


def _preprocess_config(directory: Path, side: int) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg``.

    Raises:
        InputError: when it has no words for what a file says.
    """
    together, alone = (directory / name for name in _PROCESSORS)
    nested = _checked(_Processors, together).image_processor
    processor, file = (_checked(_Processor, alone), alone) if nested is None else (nested, together)
    mode = processor.resize_mode(side)
    if mode is None:
        square = {"height": side, "width": side}
        cropped = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
        squashed, where = {"size": square, "do_center_crop": False}, "there" if nested is None else "under `image_processor`"
        raise InputError(
            f"{file}: `size` {brief(processor.size)}, `do_center_crop` {processor.do_center_crop} and `crop_size` "
            f"{brief(processor.crop_size)} together are nothing that open_clip does for a model of {side} pixels a side; "
            f"write {to_json(cropped, in_order=True)} {where} or, to squash images, {to_json(squashed, in_order=True)}"
        )
    return {
        "mean": processor.image_mean if processor.do_normalize else [0.0] * 3,
        "std": processor.image_std if processor.do_normalize else [1.0] * 3,
        "interpolation": _INTERPOLATION[processor.resample],
        "resize_mode": mode,
    }


def _weights(container: Container) -> CheckpointWeights:
    """Both towers, their projections and the logit scale, under open_clip's keys."""
    names = container.entries
    found = ((huggingface_text_place(name) or huggingface_place(name.removeprefix("vision_model.")), name) for name in names)
    parts = by_key((place, name) for place, name in found if place is not None)
    if missing := {"visual.proj", "text_projection", "token_embedding.weight", "logit_scale"} - parts.keys():
        problem = f"lacks {', '.join(sorted(missing))}; zero-shot heads need a whole CLIPModel, with its text tower"
        raise InputError(f"{container.path}: {problem}")
    return CheckpointWeights(container, parts, {})


def _write(place: Path, model: Mapping[str, Any], preprocess: Mapping[str, Any], weights: CheckpointWeights) -> None:
    """Write the whole directory, or nothing of it, unless another process has done so while this one waited for it."""
    try:
        with replacing_set(place, lambda: [CONFIG, WEIGHTS], deciding=CONFIG, seconds=_CONVERSION) as draft:
            if not (place / CONFIG).is_file():
                save_safetensors(draft / WEIGHTS, weights)
                write_json(draft / CONFIG, {"model_cfg": model, "preprocess_cfg": preprocess})
    except (OSError, SafetensorError) as error:
        problem = f"cannot be written ({getattr(error, 'strerror', None) or error}); the backbone is kept there for open_clip"
        raise InputError(f"{place}: {problem}") from error
