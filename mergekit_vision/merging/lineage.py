"""Whether experts descend from the backbone: their weights beside its own, before anything is merged."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from mergekit_vision.checkpoints import Expert
from mergekit_vision.errors import InputError
from mergekit_vision.merger import LinearInfo, Weights, linears_of_kind
from mergekit_vision.support.console import logger

_NEAR = 0.5  # cosine to the backbone: fine-tuning leaves it above 0.9, models trained apart are near 0
_FAR = 1.0  # norm of the difference, relative to the backbone's
_SMALL = 0.3  # relative norm below which weights look like differences

_PATCHES = re.compile(r"vit[-_](?:base|large|huge|[blh])[-_/]?(?:patch)?(8|14|16|32)(?!\d)", re.IGNORECASE)
"""Size of the patches in the name of a CLIP model, such as openai/clip-vit-base-patch32 or ViT-B-32."""


class Distance(NamedTuple):
    """An expert beside the backbone.

    Attributes:
        cosine: of their weights.
        difference: norm of their difference, relative to the backbone's norm.
        norm: of the expert's weights, relative to the backbone's.
    """

    cosine: float
    difference: float
    norm: float


def check_lineage(experts: Mapping[str, Expert], base: Weights, linears: Iterable[LinearInfo]) -> None:
    """Refuse experts that were not fine-tuned from the backbone, and tell of those that look odd.

    Raises:
        InputError: that names every such expert, with its cosine to the backbone and the norm of its difference.
    """
    linears, faults = list(linears), []
    for task, expert in experts.items():
        weights = expert.on(base)
        found = lineage_faults(expert, weights, base, linears)
        faults += [f"the expert of task {task} ({expert.path}) {fault}" for fault in found]
        for remark in lineage_remarks(expert, weights, base):
            logger.warning("the expert of task %s %s", task, remark)
    if faults:
        raise InputError("\n  ".join(faults))


def distance(weights: Weights, base: Weights, keys: Iterable[str]) -> Distance:
    """Compare two towers over some of their parameters; NaN where the first holds any."""
    dot = own = other = apart = 0.0
    for key in keys:
        expert, value = weights[key].to(base[key].device, torch.float32).flatten(), base[key].float().flatten()
        dot += float(expert @ value)
        own, other = own + float(expert @ expert), other + float(value @ value)
        apart += float((expert - value).square().sum())
    scale = other**0.5 or 1.0
    return Distance(dot / ((own**0.5 or 1.0) * scale), apart**0.5 / scale, own**0.5 / scale)


def lineage_faults(expert: Expert, weights: Weights, base: Weights, linears: Iterable[LinearInfo]) -> list[str]:
    """Why an expert with these weights was not fine-tuned from the backbone.

    The attention's output projections of all blocks are looked at, a twelfth of the tower.
    """
    found = distance(weights, base, [linear.weight for linear in linears_of_kind(linears, ["out_proj"])])
    if not math.isfinite(found.norm):
        return ["holds NaN or infinity in the attention's output projections; fine-tune it again or leave it out"]
    how = f"cosine to the backbone {found.cosine:.2f}, norm of the difference {found.difference:.2g} of the backbone's"
    if expert.origin["kind"] == "delta" and found.difference > _FAR / 2 and found.cosine > 1 - _NEAR / 10:
        return [f"is said to be differences, but looks like whole weights ({how}); leave out `kind: delta`"]
    if expert.relative or not (found.cosine < _NEAR or found.difference > _FAR):
        return []
    if found.norm < _SMALL and abs(found.cosine) < _NEAR:
        return [f"looks like differences to the backbone, not like weights ({how}); say `kind: delta`"]
    return [f"was not fine-tuned from this backbone ({how}); name the backbone that it was fine-tuned from"]


def lineage_remarks(expert: Expert, weights: Weights, base: Weights) -> Iterator[str]:
    """What is worth a warning."""
    if unused := expert.origin.get("unused"):
        yield f"has tensors that are not used: {', '.join(unused[:4])}{' …' if len(unused) > 4 else ''}"
    if "projection" in expert.origin:
        yield "has no projection of its own; it gets the backbone's"
    trained_on, patches = str(expert.origin.get("base_model", "")), base["visual.conv1.weight"].shape[-1]
    if (told := _PATCHES.search(trained_on)) and int(told[1]) != patches:  # its factors fit both
        yield f"was trained on {trained_on}, as its configuration says, and the backbone's patches are {patches} pixels wide"
    if all(torch.equal(weights[key].to(base[key].device, torch.float32), base[key].float()) for key in base):
        yield "equals the backbone"
