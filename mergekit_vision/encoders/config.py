"""``open_clip_config.json``, checked before open_clip builds the model that it describes."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from mergekit_vision.checkpoints.opening import open_container, weights_file
from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import raise_faults
from mergekit_vision.support.json_files import read_json
from mergekit_vision.support.schema import Schema, faults, shown

CONFIG = "open_clip_config.json"


def _whole(most: int, value: Any) -> Any:
    """A whole number, or several (an image's two sides, a ResNet's stages), or what open_clip takes for it where it is null."""
    numbers = value if isinstance(value, list) else [value]
    if value is not None and not all(type(number) is int and 0 < number <= most for number in numbers):
        raise ValueError(f"must be a whole number from 1 to {most}, not {shown(value)}")
    return value


_Side = Annotated[Any, AfterValidator(partial(_whole, 1 << 16))]
_Layers = Annotated[Any, AfterValidator(partial(_whole, 1000))]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Mean = Annotated[float, Field(ge=-1e3, le=1e3)]
_Deviation = Annotated[float, Field(ge=1e-3, le=1e3)]
"""Of pixels in [0, 1]; what is far from them makes infinity of an image, or nothing."""


class _Open(Schema):
    """A mapping of which open_clip knows more keys."""

    model_config = ConfigDict(extra="allow")


class _Norm(_Open):
    eps: _Positive = 1e-5


class _Vision(_Open):
    image_size: _Side = 224
    patch_size: _Side = 16
    layers: _Layers = 12
    width: _Side = 768
    head_width: _Side = 64
    mlp_ratio: _Positive = 4.0
    norm_kwargs: _Norm | None = None
    pool_type: str = "tok"
    attentional_pool: bool | str | None = None

    @model_validator(mode="after")
    def _one_embedding(self) -> "_Vision":
        """Heads need one embedding of an image; these towers return one of each token, or with a dimension more."""
        if self.pool_type == "none":
            raise ValueError("`pool_type` none embeds each token of an image; take a backbone with `pool_type` tok or avg")
        if isinstance(self.attentional_pool, str):
            problem = f"`attentional_pool` {self.attentional_pool} does not give one embedding of an image"
            raise ValueError(f"{problem}; take a backbone with `attentional_pool` true or false")
        return self

    @model_validator(mode="after")
    def _whole_heads(self) -> "_Vision":
        """open_clip takes as many whole heads as there are."""
        numbers = (self.width, self.head_width, self.layers)
        if all(type(number) is int for number in numbers) and self.width % self.head_width:
            raise ValueError(f"`head_width` {self.head_width} does not divide `width` {self.width}")
        return self


class _Text(_Open):
    context_length: _Side = 77
    vocab_size: Annotated[Any, AfterValidator(partial(_whole, 1 << 24))] = 49408
    width: _Side = 512
    heads: _Side = 8
    layers: _Layers = 12
    norm_kwargs: _Norm | None = None
    tokenizer_kwargs: dict[str, Any] = Field(default_factory=dict, description="a mapping of arguments")  # not null: left out
    embed_cls: bool = False


class _Model(_Open):
    embed_dim: _Side
    vision_cfg: _Vision
    text_cfg: _Text
    quick_gelu: bool = False

    @model_validator(mode="after")
    def _class_token_of_texts(self) -> "_Model":
        """CLIP's text tower is built with such a token, and then does not run."""
        if self.text_cfg.embed_cls and "multimodal_cfg" not in (self.model_extra or {}):
            raise ValueError("`text_cfg.embed_cls` goes with `multimodal_cfg`, as CoCa has it")
        return self


class _Preprocess(_Open):
    mean: list[_Mean] = Field(default=[0.0] * 3, min_length=3, max_length=3, description="three numbers from -1000 to 1000")
    std: list[_Deviation] = Field(default=[1.0] * 3, min_length=3, max_length=3, description="three numbers from 0.001 to 1000")
    mode: Literal["RGB"] = "RGB"
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"


class _Config(_Open):
    model_cfg: _Model
    preprocess_cfg: _Preprocess = Field(default_factory=_Preprocess)


def read_config(directory: Path) -> dict[str, Any]:
    """Content of a model directory's ``open_clip_config.json``.

    Raises:
        InputError: when it is missing, cannot be read, or does not describe a model; all faults are listed.
    """
    path = directory / CONFIG
    content = read_json(path)
    raise_faults(path, faults(_Config, content, "the file"))
    return dict(content)


def check_size(directory: Path, parameters: int) -> None:
    """Refuse a configuration of a much larger model than the weights beside it are: open_clip would build it before it compares.

    Args:
        directory: of the model.
        parameters: of the model that is described.

    Raises:
        InputError: when no file of weights has a byte for each.
    """
    files = [file for file in directory.iterdir() if file.suffix in (".safetensors", ".bin", ".pth")]
    largest = max((file.stat().st_size for file in files), default=parameters)
    if largest < parameters:
        problem = f"describes a model of {parameters} parameters, but the weights beside it are {largest} bytes"
        raise InputError(f"{directory / CONFIG}: {problem}; copy or download both again")


def check_positions(directory: Path, context: int, places: int) -> None:
    """Refuse a configuration of other positional embeddings than the weights have: open_clip would interpolate without a word.

    Args:
        directory: of the model, with its weights.
        context: length of texts that is described, in tokens.
        places: tokens of an image by the sizes that are described, the class token included.

    Raises:
        InputError: when a tower's positional embedding is of another number.
    """
    stored = open_container(weights_file(directory)).entries
    for name, count, told in (
        ("positional_embedding", context, f"text_cfg: `context_length` is {context}"),
        ("text.positional_embedding", context, f"text_cfg: `context_length` is {context}"),
        ("visual.positional_embedding", places, f"vision_cfg: `image_size` and `patch_size` make {places} tokens of an image"),
    ):
        if name in stored and stored[name].shape[:1] != (count,):
            problem = f"{told}, and the weights have {(*stored[name].shape, 'none')[0]}"
            raise InputError(f"{directory / CONFIG}: model_cfg.{problem}; copy or download both again")
