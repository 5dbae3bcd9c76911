"""``adapter_config.json`` of the library ``peft``."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergekit_vision.checkpoints.lora import finite
from mergekit_vision.errors import InputError

_PLAIN_PATTERN = re.compile(r"\^?[\w.]+\$?")

_SOUND_STARTS = (True, False, None, "gaussian", "eva", "true", "false")
"""Ways to initialize the matrices that leave the backbone as it is; others change the weights that they are added to."""

_REFUSED = (  # options of PEFT under which A and B alone are not the change
    "use_qalora", "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "arrow_config", "megatron_config", "use_bdlora", "velora_config", "kasa_config", "monteclora_config",
)  # fmt: skip

_MODELS = (
    "CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPVisionTransformer", "VisionTextDualEncoderModel",
)  # fmt: skip
"""Classes of transformers whose vision tower may be CLIP's."""

_SWITCHES = ("use_rslora", "use_dora", "lora_bias")  # fan_in_fan_out is for Conv1D: with Linear layers peft ignores it


def check_options(path: Path, options: Mapping[str, Any]) -> None:
    """Check that ``ΔW = scale · B A`` is all that an adapter changes.

    Raises:
        InputError: when it is not, or the configuration is at fault.
    """
    kind = options.get("peft_type", "LORA")
    if kind != "LORA":
        raise InputError(f"{path}: an adapter of the kind {kind}; only LORA can be added to a backbone's weights exactly")
    model = options.get("auto_mapping") or {}
    if not isinstance(model, Mapping):
        raise InputError(f"{path}: auto_mapping must be an object, not {model!r:.40}")
    adapted, library = (str(model.get(key)) for key in ("base_model_class", "parent_library"))
    if library.partition(".")[0] == "transformers" and adapted not in _MODELS:
        raise InputError(f"{path}: an adapter of the class {adapted}; train it on one of {', '.join(_MODELS)}")
    start = options.get("init_lora_weights", True)
    if start not in _SOUND_STARTS:
        raise InputError(
            f"{path}: init_lora_weights is {start!r}, which changes the weights that the adapter is added to; "
            "convert it with peft's path_initial_model_for_weight_conversion, or save the merged model"
        )
    refused = [name for name in _REFUSED if options.get(name)]
    if refused:
        raise InputError(f"{path}: uses {', '.join(refused)}, so A and B alone are not its change; save the merged model")
    odd = [name for name in _SWITCHES if not isinstance(options.get(name) or False, bool)]
    if odd:
        raise InputError(f"{path}: {' and '.join(odd)} must be true or false")


def scaling(path: Path, options: Mapping[str, Any], scale: float | None) -> Callable[[str, int], float]:
    """The factor of ``B A`` of a layer with a rank, by PEFT's rules.

    Args:
        path: of the configuration.
        options: that it holds.
        scale: the factor of all layers instead.

    Raises:
        InputError: when a pattern is not a plain one; what is returned raises it for a rank or a factor that cannot be.
    """
    ranks, alphas = (_pattern(path, options, name) for name in ("rank_pattern", "alpha_pattern"))

    def factor(module: str, rank: int) -> float:
        if scale is not None:
            return scale
        told, alpha = _matching(ranks, module, options.get("r")), _matching(alphas, module, options.get("lora_alpha"))
        if told != rank:
            raise InputError(
                f"{path}: gives {module} the rank {told!r}, but its matrices have {rank}; they do not belong together"
            )
        number = finite(alpha)
        if number is None:
            raise InputError(f"{path}: lora_alpha must be a number, not {alpha!r:.40}")
        return number / math.sqrt(rank) if options.get("use_rslora") else number / rank

    return factor


def _pattern(path: Path, options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """``rank_pattern`` or ``alpha_pattern``: ends of layers' names -> number."""
    found = options.get(name) or {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: {name} must be an object, not {found!r}")
    odd = next((key for key in found if not _PLAIN_PATTERN.fullmatch(key)), None)
    if odd is not None:  # a regular expression from a file could run for ever
        raise InputError(f"{path}: {name} has the key {odd!r}; only names of layers or of their last parts are read")
    return found


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The number for a layer: that of the first key that ends its name, as PEFT has it."""
    for key, value in patterns.items():
        if key.startswith("^"):
            if key.strip("^$") == module:
                return value
        elif f".{module}".endswith(f".{key.rstrip('$')}"):
            return value
    return default
