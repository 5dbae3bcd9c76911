"""Finding the vision tower among the tensors of a checkpoint, whatever wraps it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from mergekit_vision.checkpoints.container import Container, TensorInfo
from mergekit_vision.checkpoints.places import Place, by_key, huggingface_place
from mergekit_vision.errors import InputError

Family = Literal["open_clip", "huggingface"]

_FIRST: dict[str, Family] = {"conv1.weight": "open_clip", "embeddings.patch_embedding.weight": "huggingface"}
"""End of the name of a tower's patch embedding -> the library that names it so."""

_INSERTED = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module)\.")
"""What torch.compile, FSDP, activation checkpointing and PEFT put anywhere into names."""

ADAPTED = re.compile(r"\.(?:lora_|modules_to_save\.)")
"""What PEFT adds to the names of a model's own tensors."""

_TOWERS: dict[str, Family] = {"visual": "open_clip", "vision_model": "huggingface"}
_TOWER = re.compile(r"(?:.*?\.)??(visual|vision_model)\.")
"""Beginning of the names of a part of a tower."""

_MOST = 64  # towers that are looked at, each among all names

_TRANSIENT = ("embeddings.position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")
"""What a tower may bring along that is no parameter."""


class Tower(NamedTuple):
    """A vision tower in a checkpoint.

    Attributes:
        family: whose names it uses.
        prefix: of its names.
        names: name without the prefix -> name in the file.
        parent: the prefix of the model that it is part of.
    """

    family: Family
    prefix: str
    names: Mapping[str, str]
    parent: str

    @property
    def averaged(self) -> bool:
        """Whether these are averaged weights, by the name of what holds them."""
        return any("ema" in part.lower().split("_") or part.lower().startswith("ema") for part in self.prefix.split("."))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name without what wrappers insert -> name in the file.

    >>> plain_names(["visual._orig_mod.proj"])
    {'visual.proj': 'visual._orig_mod.proj'}
    """
    found: dict[str, str] = {}
    for name in names:
        plain = _INSERTED.sub("", name)
        found[name if plain in found else plain] = name  # none hides another
    return found


def find_tower(container: Container, key: str | None = None, ema: bool | None = None) -> Tower | None:
    """The vision tower of a checkpoint; ``None`` where there is none.

    Args:
        container: of the tensors.
        key: what its names begin with, where the file holds several.
        ema: whether averaged weights are wanted; where not said, they are taken only if the file holds no others.

    Raises:
        InputError: when several are there, or not the one that is wanted.
    """
    every = towers(container.entries)
    found = [tower for tower in every if key is None or tower.prefix.startswith(key)]
    kinds = {tower.averaged for tower in found}
    if ema is not None or kinds == {True, False}:
        found = [tower for tower in found if tower.averaged == bool(ema)]
    _check_one(container, [tower.prefix for tower in found])
    if every and not found:
        wanted = f"with names in {key!r}" if key is not None else "of averaged weights" if ema else "but of averaged weights"
        prefixes = ", ".join(_shown(tower.prefix) for tower in every[:4])
        raise InputError(f"{container.path}: has no vision tower {wanted}; those in it are named {prefixes}")
    return found[0] if found else None


def find_part(container: Container, key: str | None = None) -> Tower | None:
    """What a checkpoint holds of a vision tower, by the usual names alone; ``None`` where it holds nothing of one.

    Raises:
        InputError: when it holds parts of several.
    """
    names = plain_names(container.entries)
    begun = {match[0]: _TOWERS[match[1]] for name in names if (match := _TOWER.match(name)) and name.startswith(key or "")}
    _check_one(container, list(begun))
    return next((_tower(family, prefix, names) for prefix, family in begun.items()), None)


def _check_one(container: Container, prefixes: Sequence[str]) -> None:
    if len(prefixes) > 1:
        named = f"{', '.join(map(_shown, prefixes[:4]))}{' and more' if len(prefixes) > 4 else ''}"
        raise InputError(f"{container.path}: holds {len(prefixes)} vision towers, named {named}; choose one by `key:`")


def places(tower: Tower) -> tuple[dict[str, list[tuple[Place, str]]], list[str]]:
    """Which stored tensors make each of open_clip's parameters.

    Returns:
        Key -> the place and the name in the file of each of its parts; and the names that are no parameter of a CLIP tower.
    """
    found, unknown = [], []
    for name, full in tower.names.items():
        if name in _TRANSIENT:
            continue
        place = Place(f"visual.{name}") if tower.family == "open_clip" else huggingface_place(name)
        if place is None:
            unknown.append(full)
        else:
            found.append((place, full))
    return by_key(found), unknown


def towers(entries: Mapping[str, TensorInfo]) -> list[Tower]:
    """The vision towers of a checkpoint, by their patch embeddings: the first of them, if they are very many."""
    names = plain_names(entries)
    found: list[Tower] = []
    for plain, name in names.items():
        shape = entries[name].shape
        ending = next((end for end in _FIRST if plain == end or plain.endswith(f".{end}")), None)
        if ending is not None and len(shape) == 4 and shape[1] == 3:
            if len(found) == _MOST:
                break
            found.append(_tower(_FIRST[ending], plain.removesuffix(ending), names))
    return found


def _tower(family: Family, prefix: str, names: Mapping[str, str]) -> Tower:
    inside = {plain: name for plain, name in names.items() if plain.startswith(prefix) and not ADAPTED.search(plain)}
    own = {plain.removeprefix(prefix): name for plain, name in inside.items()}
    parent = prefix.removesuffix("visual." if family == "open_clip" else "vision_model.")
    if family == "huggingface":
        projection = _projection(parent, names)
        own = {plain: name for plain, name in own.items() if not plain.startswith(("visual_projection.", "text_", "logit_"))}
        if projection is not None:
            own["visual_projection.weight"] = names[projection]
    return Tower(family, prefix, own, parent)


def _projection(parent: str, names: Mapping[str, str]) -> str | None:
    """Name of the projection that goes with a tower of transformers: beside it, or beside a model that it is part of."""
    while f"{parent}visual_projection.weight" not in names:
        if not parent:
            return None
        parent = parent.rstrip(".").rpartition(".")[0]
        parent += "." if parent else ""
    return f"{parent}visual_projection.weight"


def _shown(prefix: str) -> str:
    return f"`{prefix}…`" if prefix else "without a prefix"
