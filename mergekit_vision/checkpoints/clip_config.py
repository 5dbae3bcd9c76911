"""``config.json`` of a CLIP model of the library ``transformers``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_vision.checkpoints.opening import read_object
from mergekit_vision.errors import InputError

_KINDS = ("clip", "clip_vision_model")


def clip_config(place: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """The configuration beside weights, or in their directory, where there is one of a CLIP model.

    Raises:
        InputError: when it is of another model.
    """
    file = (place if place.is_dir() else place.parent) / "config.json"
    config = older_first(read_object(file)) if file.is_file() else {}
    kind = config.get("model_type")
    if kind is not None and kind not in _KINDS:
        raise InputError(f"{file}: is of a {kind!r} model, not of CLIP ({' or '.join(_KINDS)})")
    return None if kind is None else (file, config)


def activation(file: Path, config: Mapping[str, Any]) -> str:
    """The activation function that a configuration names; transformers leaves out what is the default."""
    vision = config.get("vision_config") or {} if config["model_type"] == "clip" else config
    if not isinstance(vision, Mapping):
        raise InputError(f"{file}: vision_config must be an object, not {vision!r}")
    return str(vision.get("hidden_act", "quick_gelu"))


def older_first(config: Any) -> Any:
    """A configuration as transformers reads it: parts under their older names come first.

    >>> older_first({"model_type": "clip", "vision_config": {}, "vision_config_dict": {"hidden_act": "gelu"}})["vision_config"]
    {'hidden_act': 'gelu'}
    """
    if not isinstance(config, dict):
        return config
    older = {part: config.get(f"{part}_dict") for part in ("vision_config", "text_config")}
    return {**config, **{part: value for part, value in older.items() if value is not None}}
