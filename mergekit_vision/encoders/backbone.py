"""Pre-trained CLIP models: what is known of one before its weights are read, and reading it."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mergekit_vision.checkpoints import SUFFIXES
from mergekit_vision.checkpoints.hub import HubFile, cached_snapshot, commit_of, fetch_snapshot
from mergekit_vision.checkpoints.safetensors_file import SafetensorsFile
from mergekit_vision.encoders.config import CONFIG, check_positions, check_size, read_config
from mergekit_vision.encoders.huggingface import WEIGHTS, as_open_clip, is_huggingface
from mergekit_vision.errors import InputError
from mergekit_vision.support.fingerprints import digest, fingerprint
from mergekit_vision.support.hub import without_retries
from mergekit_vision.support.json_files import to_json
from mergekit_vision.support.memory import is_spent
from mergekit_vision.support.paths import is_file
from mergekit_vision.support.tensors import unusable

PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")
"""What open_clip stores of each model's preprocessing; the image size comes from the model."""

_UNLOADABLE = (  # what open_clip and its readers raise for names, configurations and weights that they cannot use
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
    EOFError,
    RuntimeError,
    PickleError,
    SafetensorError,
)


@dataclass(frozen=True)
class Backbone:
    """What is known of a backbone before its weights are read.

    Attributes:
        name: open_clip model name: built in, ``hf-hub:org/name`` or ``local-dir:path``.
        pretrained: open_clip tag or checkpoint file, for a built-in name.
        model: open_clip's ``model_cfg``.
        preprocess: open_clip's ``preprocess_cfg``, complete.
        shapes: open_clip key of the vision tower -> shape.
    """

    name: str
    pretrained: str | None
    model: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def activation(self) -> str:
        """``quick_gelu`` or ``gelu``."""
        return "quick_gelu" if self.model.get("quick_gelu") else "gelu"

    @property
    def tower(self) -> dict[str, Any]:
        """How the vision tower computes with its weights: its configuration with open_clip's defaults."""
        import open_clip

        vision = open_clip.CLIPVisionCfg(**self.model.get("vision_cfg", {}))
        return {"quick_gelu": bool(self.model.get("quick_gelu")), **asdict(vision)}


def describe_backbone(name: str, pretrained: str | None = None) -> Backbone:
    """Configuration and vision-tower shapes of a backbone, without reading a weight.

    Raises:
        InputError: for an unknown or incomplete model, a configuration that describes none, a tower that is no open_clip ViT, or
            an activation function that is not the one the pre-trained weights need.
    """
    ours = open_clip_name(name)
    directory = _directory(ours)
    try:
        return _described(ours, pretrained, None if directory is None else to_json(read_config(directory)))
    except InputError as error:
        if ours == name:
            raise
        raise InputError(f"backbone {name}: in the layout of open_clip, it cannot be used: {error}") from error


@lru_cache(maxsize=8)
def _described(name: str, pretrained: str | None, config_in_directory: str | None) -> Backbone:
    """The description, made once for each content of a directory's configuration."""
    import open_clip

    _refuse_wrong_activation(name, pretrained)
    with _loading(name), torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
        preprocess = dict(open_clip.get_model_preprocess_cfg(model))
        config = _model_config(name)
    if pretrained is not None and (tag := open_clip.get_pretrained_cfg(name, pretrained)):
        preprocess.update({key: tag[key] for key in PREPROCESS_KEYS if key in tag})
    _require_vit(name, model)
    if directory := _directory(name):
        check_size(directory, sum(parameter.numel() for parameter in model.parameters()))
    shapes = {f"visual.{key}": tuple(value.shape) for key, value in model.visual.state_dict().items()}
    return Backbone(name, pretrained, config, preprocess, shapes)


def load_clip(name: str, pretrained: str | None = None) -> nn.Module:
    """A pre-trained open_clip model in float32 on the CPU, in evaluation mode.

    What a safetensors file of a directory holds in float32 is not copied into memory: such parameters are views of the mapped
    file. They can be written to as any others, which does not change the file.

    Raises:
        InputError: as :func:`describe_backbone`, or when its weights cannot be obtained or hold what no weight is, the text
            tower's too.
    """
    import open_clip

    name = open_clip_name(name)
    places = describe_backbone(name, pretrained).shapes["visual.positional_embedding"][0]
    builtin = not name.startswith(("local-dir:", "hf-hub:"))
    if builtin and pretrained is None:
        raise InputError(f"backbone {name}: add `pretrained:` to the suite (a tag such as `openai`, or a checkpoint file)")
    with _loading(name), nullcontext() if name.startswith("local-dir:") else without_retries():
        model: nn.Module = open_clip.create_model(name, pretrained=pretrained, require_pretrained=True)
        if directory := _directory(name):
            check_positions(directory, int(getattr(model, "context_length", 0)), places)
    if faults := unusable(dict(model.named_parameters())):
        more = f" (and {len(faults) - 1} more such tensors)" if len(faults) > 1 else ""
        raise InputError(f"backbone {name}: {faults[0]}{more}; copy or download its weights again")
    model.eval().requires_grad_(False)
    if file := stored_weights(name):
        _map(model, file)
    return model


def stored_weights(name: str) -> SafetensorsFile | None:
    """The file from which a directory's weights are mapped, by open_clip's name; ``None`` where there is none to be read."""
    directory = _directory(name)
    path = None if directory is None else directory / WEIGHTS
    try:
        return None if path is None or not path.is_file() else SafetensorsFile(path)
    except InputError:  # whatever open_clip has read instead
        return None


def weights_fingerprint(name: str, pretrained: str | None = None) -> str:
    """Hash of what decides a backbone's weights, none of which is loaded: their files, or under which name they are published.

    Raises:
        InputError: when a file cannot be read.
    """
    directory = _directory(open_clip_name(name))
    if directory is not None:
        return digest(*(fingerprint(file) for file in sorted(directory.iterdir()) if file.suffix in SUFFIXES))
    if pretrained and is_file(pretrained):
        return fingerprint(pretrained)
    known = cached_snapshot(HubFile.parse(name)) if name.startswith("hf-hub:") else None
    return digest(name, pretrained, known and commit_of(known))


def _map(model: nn.Module, file: SafetensorsFile) -> None:
    """Have parameters be views of a file that holds them as they are, instead of copies."""
    for name, parameter in model.named_parameters():
        if name not in file.entries:
            continue
        stored = file.read(name)
        if stored.dtype == parameter.dtype and torch.equal(stored, parameter):
            parameter.data = stored


def made_up_clip(name: str, blocks: int) -> nn.Module:
    """A model with the first blocks of each tower and with small random weights, for measurements; no weights are read.

    Raises:
        InputError: as :func:`describe_backbone`.
    """
    import open_clip

    name = open_clip_name(name)
    describe_backbone(name)
    with _loading(name), torch.device("meta"):
        model: nn.Module = open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    for tower in (model.visual, getattr(model, "text", model)):
        resblocks: Any = getattr(getattr(tower, "transformer", None), "resblocks", None)
        if resblocks is not None:
            del resblocks[blocks:]
    model.to_empty(device="cpu")
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            torch.nn.init.normal_(value, std=0.02)
    return model.eval().requires_grad_(False)


class BackboneWeights(Mapping[str, Tensor]):
    """Weights of a backbone's vision tower by open_clip key, float32 on the CPU, loaded when the first of them is read."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __getitem__(self, key: str) -> Tensor:
        return self._weights[key]

    def __contains__(self, key: object) -> bool:
        return key in self._backbone.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._backbone.shapes)

    def __len__(self) -> int:
        return len(self._backbone.shapes)

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        visual = load_clip(self._backbone.name, self._backbone.pretrained).visual
        return {f"visual.{name}": value for name, value in visual.state_dict().items()}  # type: ignore[union-attr]


def load_tokenizer(name: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of an open_clip model: texts -> token indices ``[N, context_length]``, int64.

    Raises:
        InputError: when it cannot be obtained.
    """
    import open_clip

    try:
        with _loading(name):
            return open_clip.get_tokenizer(open_clip_name(name))  # type: ignore[no-any-return]
    except ImportError as error:
        problem = f"its tokenizer needs a library that is missing ({_shortened(str(error))}), most likely transformers"
        raise InputError(f"backbone {name}: {problem}; pip install 'mergekit-vision[hf]'") from error


def backbone_repository(name: str, pretrained: str | None = None) -> str | None:
    """The repository of the hub that a backbone's weights come from; ``None`` where they come from a disk or another server."""
    import open_clip

    if name.startswith("hf-hub:"):
        return HubFile.parse(name).repository
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained and not name.startswith("local-dir:") else {}
    return "/".join(tag["hf_hub"].split("/")[:2]) if tag and tag.get("hf_hub") else None


def open_clip_name(name: str) -> str:
    """The name by which open_clip loads a model: another one for models of transformers, and for revisions of the hub.

    Raises:
        InputError: when the model cannot be had, or open_clip cannot express it.
    """
    directory = _directory(name) or (_on_the_hub(name) if name.startswith("hf-hub:") else None)
    if directory is None:
        return name
    return f"local-dir:{as_open_clip(directory) if is_huggingface(directory) else directory}"


@lru_cache(maxsize=8)
@without_retries()
def _on_the_hub(name: str) -> Path | None:
    """The directory of a model on the hub; ``None`` where open_clip finds it itself."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    file = HubFile.parse(name)
    if file.revision is None:
        with _loading(name):
            try:
                hf_hub_download(file.repository, CONFIG)
                return None
            except EntryNotFoundError:  # of the layout of transformers
                pass
    return fetch_snapshot(file)


def _directory(name: str) -> Path | None:
    """The directory that a model's name stands for, if it does."""
    return Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None


def _refuse_wrong_activation(name: str, pretrained: str | None) -> None:
    import open_clip

    if name.startswith(("local-dir:", "hf-hub:")):
        return
    config = open_clip.get_model_config(name)
    if config is None:
        raise InputError(f"backbone {name}: open_clip does not know this model; `open_clip.list_models()` names those it does")
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    if not tag and pretrained and not Path(pretrained).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise InputError(f"backbone {name}: pretrained {pretrained!r} is neither a file nor one of its tags ({tags})")
    if tag and bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise InputError(f"backbone {name}: the weights {pretrained!r} were trained with the other GELU; use {other}")


def _model_config(name: str) -> dict[str, Any]:
    import open_clip

    if directory := _directory(name):
        return dict(read_config(directory)["model_cfg"])
    if name.startswith("hf-hub:"):
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(name.removeprefix("hf-hub:"), "open_clip_config.json"))
        return dict(json.loads(path.read_text())["model_cfg"])
    return dict(open_clip.get_model_config(name))


def _require_vit(name: str, model: nn.Module) -> None:
    blocks = getattr(getattr(model.visual, "transformer", None), "resblocks", None)
    if blocks is None or not all(isinstance(getattr(block, "attn", None), nn.MultiheadAttention) for block in blocks):
        raise InputError(
            f"backbone {name}: its vision tower ({type(model.visual).__name__}) is not one of open_clip's own ViTs; "
            "towers from timm, ResNets and custom attention blocks cannot be merged here"
        )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what open_clip raises for a model that it cannot make into one line, and keep its log messages out of the way."""
    with _without_root_messages():
        try:
            yield
        except _UNLOADABLE as error:
            if is_spent(error):
                raise
            raise InputError(f"backbone {name}: {_shortened(str(error)) or _unexplained(error)}") from error


def _shortened(message: str) -> str:
    """The first of many lines, such as torch writes one for each parameter."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    more = f" … and {len(lines) - 3} more" if len(lines) > 3 else ""
    return " ".join(lines[:3]) + more


def _unexplained(error: Exception) -> str:
    """What to say of an error without a text, such as open_clip's assertions."""
    return f"open_clip cannot build it ({type(error).__name__}); see its `{CONFIG}`"


@contextmanager
def _without_root_messages() -> Iterator[None]:
    """Hold back the root logger's remarks and warnings, which is where open_clip's go, while the context is open."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def severe(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    root.addFilter(severe)
    root.addHandler(handler)  # the functions of `logging` configure a root logger that has none
    try:
        yield
    finally:
        root.removeFilter(severe)
        root.removeHandler(handler)
