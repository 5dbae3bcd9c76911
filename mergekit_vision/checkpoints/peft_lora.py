"""LoRA adapters of the library ``peft``, with its variants."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_vision.checkpoints.container import Container
from mergekit_vision.checkpoints.lora import Adapter, Update
from mergekit_vision.checkpoints.peft_config import check_options, scaling
from mergekit_vision.checkpoints.places import Place, huggingface_place, linear_place, open_clip_place
from mergekit_vision.checkpoints.weights import CheckpointWeights, Parts
from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import repeated

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?\.(?P<part>weight|bias)")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?")
_WRAPPERS = ("model.", "module.", "image_encoder.", "clip.")
_AROUND = re.compile(r".*\.(?=(?:vision_model|visual)\.|visual_projection(?:\.|$))")
"""What comes before a tower that has its own name."""


class _Found(NamedTuple):
    """Names in a file of peft.

    Attributes:
        factors: layer -> part, such as ``A.weight`` -> name.
        magnitudes: layer -> name.
        rest: all other names.
        adapter: what names call the adapter; ``None`` where they do not.
    """

    factors: dict[str, dict[str, str]]
    magnitudes: dict[str, str]
    rest: list[str]
    adapter: str | None


def peft_adapter(
    container: Container, config: tuple[Path, Mapping[str, Any]] | None, scale: float | None, base: CheckpointWeights | None
) -> Adapter:
    """An adapter of the library ``peft``, LoRA with its variants.

    Args:
        container: of the tensors.
        config: the file ``adapter_config.json`` and what it holds, where it was found.
        scale: factor of ``B A`` in place of the one that the configuration gives.
        base: weights in the same file that are adapted.

    Raises:
        InputError: when the configuration asks for what is not LoRA or changes its base, or tensors are of unknown layers.
    """
    path, options = config if config is not None else (container.path, {})
    check_options(path, options)
    if not options and scale is None:
        remedy = "keep it beside the weights, or give the factor of B A (alpha / r) as `scale:`"
        raise InputError(f"{container.path}: a LoRA adapter without adapter_config.json, which has its scale; {remedy}")
    found = _factors(container)
    if options.get("use_dora") and (lost := found.factors.keys() - found.magnitudes.keys()):
        raise InputError(
            f"{path}: uses DoRA, but {min(lost)} lacks its lora_magnitude_vector; copy or download the weights again"
        )
    if twice := repeated(_module(layer) for layer in found.factors):
        raise InputError(f"{container.path}: adapts {twice[0]} of more than one tower; save the adapter of one alone")
    factor = scaling(path, options, scale)
    both = any("visual." in name and ".lora_" in name for name in container.entries)
    updates = [
        Update(
            _linear(container.path, _module(layer), both),
            names["A.weight"],
            names["B.weight"],
            factor(_matched(layer), _rank(container, names["A.weight"])) * _times(names["A.weight"]),
            found.magnitudes.get(layer),
            names.get("B.bias"),
        )
        for layer, names in found.factors.items()
    ]
    origin: dict[str, Any] = {"kind": "lora", "family": "peft"}
    if base is not None:
        origin |= {name: base.origin[name] for name in ("unused", "projection") if name in base.origin}
    if model := options.get("base_model_name_or_path"):
        origin["base_model"] = str(model)
    return Adapter(container, updates, _replaced(container, found, base), origin, base, () if config is None else (path,))


def _rank(container: Container, name: str) -> int:
    shape = container.entries[name].shape
    if len(shape) != 2 or not shape[0]:
        raise InputError(f"{container.path}: {name} is {shape}, which is no factor of a matrix; copy or download it again")
    return shape[0]


def _times(name: str) -> int:
    """How often peft adds a change: that of the output projection inside of a MultiheadAttention twice, in training too."""
    return 2 if ".attn.base_layer.out_proj." in name else 1


def _factors(container: Container) -> _Found:
    """Sort the names in a file.

    Raises:
        InputError: when several adapters are in the file, or a factor lacks its other.
    """
    factors: dict[str, dict[str, str]] = {}
    magnitudes, rest = {}, []
    adapters: set[str | None] = set()
    for name in container.entries:
        factor, magnitude = _FACTOR.fullmatch(name), _MAGNITUDE.fullmatch(name)
        if factor is not None:
            adapters.add(factor["adapter"])
            factors.setdefault(_layer(factor["module"]), {})[f"{factor['which']}.{factor['part']}"] = name
        elif magnitude is not None:
            magnitudes[_layer(magnitude["module"])] = name
        else:
            rest.append(name)
    if len(adapters) > 1:
        raise InputError(
            f"{container.path}: holds {len(adapters)} adapters ({', '.join(sorted(map(str, adapters)))}); save each alone"
        )
    halves = [layer for layer, names in factors.items() if not {"A.weight", "B.weight"} <= names.keys()]
    halves += [layer for layer in magnitudes if layer not in factors]
    if halves or not factors:
        what = f"{halves[0]} lacks lora_A or lora_B" if halves else "has no lora_A and lora_B"
        raise InputError(f"{container.path}: {what}; copy or download it again")
    return _Found(factors, magnitudes, rest, adapters.pop())


def _layer(name: str) -> str:
    """A layer's name in the model that peft was given.

    >>> _layer("encoder.base_model.model.clip.vision_model.encoder.layers.0.mlp.fc1")
    'clip.vision_model.encoder.layers.0.mlp.fc1'
    """
    return name.rpartition("base_model.model.")[2]


def _matched(layer: str) -> str:
    """The name that peft compares with patterns: of the output projection in a MultiheadAttention, the attention's."""
    return layer.partition(".base_layer")[0]


def _module(layer: str) -> str:
    """A layer's name without what wraps the model.

    >>> _module("backbone.vision_model.encoder.layers.0.mlp.fc1")
    'vision_model.encoder.layers.0.mlp.fc1'
    >>> _module("model.transformer.resblocks.0.attn.base_layer.out_proj")
    'transformer.resblocks.0.attn.out_proj'
    """
    layer = layer.replace(".base_layer", "")
    if (around := _AROUND.match(layer)) is not None:
        return layer[around.end() :]
    while (wrapper := next((wrapper for wrapper in _WRAPPERS if layer.startswith(wrapper)), None)) is not None:
        layer = layer.removeprefix(wrapper)
    return layer


def _linear(path: Path, module: str, both: bool) -> Place:
    """Place of a layer's weight; where layers of both towers may be adapted, those without a prefix are the text tower's."""
    place = linear_place(module)
    if place is not None and not (both and module.startswith("transformer.")):
        return place
    if module.startswith(("text_model.", "text_projection", "transformer.resblocks")) or ".text_model." in module:
        raise InputError(f"{path}: adapts the text tower ({module}), whose zero-shot heads are the backbone's")
    raise InputError(f"{path}: adapts {module}, which is not a Linear layer of CLIP's vision tower")


def _replaced(container: Container, adapter: _Found, base: CheckpointWeights | None) -> Parts:
    """Places of the parameters that an adapter holds whole: biases, and modules that were trained beside it."""
    known = set() if base is None else {name for parts in base.parts.values() for _, name in parts}
    # a tower of open_clip alone; beside one with its own name, such names are the text tower's
    bare = not any("visual." in name for name in container.entries) and (base is None or base.origin["family"] == "open_clip")
    saved = re.compile(rf"modules_to_save\.(?:{re.escape(adapter.adapter or 'default')}\.)?")
    found: dict[str, list[tuple[Place, str]]] = {}
    for name in adapter.rest:
        if name in known or ".original_module." in name:  # as it was before training
            continue
        plain = _module(_layer(saved.sub("", name)))
        place = huggingface_place(plain.removeprefix("vision_model."))
        if place is None:
            place = Place(plain) if plain.startswith("visual.") else open_clip_place(plain) if bare else None
        if place is None and base is not None:  # a head, or the text tower
            continue
        if place is None:
            raise InputError(f"{container.path}: holds {name}, which is no parameter of CLIP's vision tower; remove it")
        found.setdefault(place.key, []).append((place, name))
    return found
