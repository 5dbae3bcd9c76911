"""What a checkpoint is, and whether it can be an expert."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_vision.checkpoints import Expert, ExpertSource, open_expert
from mergekit_vision.checkpoints.container import Container
from mergekit_vision.checkpoints.opening import open_container, weights_file
from mergekit_vision.checkpoints.sizes import tower_sizes
from mergekit_vision.encoders.backbone import describe_backbone, load_clip
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.merger import LinearInfo, Weights
from mergekit_vision.merging.lineage import Distance, distance, lineage_faults, lineage_remarks
from mergekit_vision.suites.checks import expert_faults
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.tensors import FINITE, unusable


@dataclass
class Inspection:
    """What was found.

    Attributes:
        files: that hold the weights, with their sizes in bytes.
        container: kind of the file, in words.
        tensors: how many are stored, of all kinds.
        numbers: how many numbers they hold.
        dtypes: dtype -> how many tensors have it.
        origin: what an expert's tower was found to be; empty where there is none.
        architecture: of the tower, as far as shapes tell.
        models: names of open_clip's models of this architecture.
        refused: why it cannot be an expert, or not one of the suite; empty where it can.
        remarks: what is odd about it beside the backbone, though it is an expert.
        whole: the tower beside the backbone; ``None`` without a suite.
        changes: Linear layer -> norm of its change, relative to the backbone's weight.
    """

    files: dict[str, int]
    container: str
    tensors: int
    numbers: int
    dtypes: dict[str, int]
    origin: dict[str, Any] = field(default_factory=dict)
    architecture: dict[str, int] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    refused: str = ""
    remarks: list[str] = field(default_factory=list)
    whole: Distance | None = None
    changes: dict[LinearInfo, float] = field(default_factory=dict)


def inspect_checkpoint(checkpoint: str, suite: Path | None = None, allow_code: bool = False, **options: Any) -> Inspection:
    """Look at a checkpoint: at its header, and with a suite at its weights beside the suite's backbone.

    Args:
        checkpoint: a path, or ``hf-hub:org/name[@revision][:path/in/repo]``.
        suite: file of a suite, whose backbone it is compared with. What the suite says of how this expert is read holds here too.
        allow_code: whether a data set class that no installed package registers may be asked for the names of its classes.
        options: ``kind``, ``key``, ``ema`` and ``scale`` of an :class:`~mergekit_vision.checkpoints.ExpertSource`.

    Raises:
        InputError: when the file cannot be read at all, or the suite or its backbone is at fault.
    """
    source = ExpertSource.parse(checkpoint, Path.cwd(), **options)
    described = None if suite is None else Suite.load(suite, allow_code)
    if described is not None and source == ExpertSource(source.path, source.hub):  # nothing was said of how it is read
        source = next((task.expert for task in described.tasks.values() if same_place(task.expert, source)), source)
    found = _outside(open_container(weights_file(source.fetch())))
    try:
        expert = open_expert(source)
    except InputError as error:
        found.refused = str(error)
        return found
    found.origin = dict(expert.origin)
    found.architecture = tower_sizes(expert.shapes)
    found.models = _models(found.architecture)
    if described is not None:
        _compare(found, expert, described)
    return found


def _outside(container: Container) -> Inspection:
    entries = container.entries.values()
    return Inspection(
        files={str(file): file.stat().st_size for file in container.files},
        container=container.kind,
        tensors=len(entries),
        numbers=sum(math.prod(info.shape) for info in entries),
        dtypes=dict(Counter(info.dtype for info in entries)),
    )


def _models(architecture: Mapping[str, int]) -> list[str]:
    """open_clip's plain CLIP models whose vision tower has these sizes."""
    import open_clip

    names = {"width": "width", "patch size": "patch_size", "image size": "image_size", "layers": "layers"}
    if not architecture.keys() >= names.keys():
        return []
    found = []
    for name in (name for name in open_clip.list_models() if name.startswith("ViT")):
        config = open_clip.get_model_config(name)
        vision = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, **config["vision_cfg"]}
        same = all(vision[key] == architecture[part] for part, key in names.items())
        if same and architecture.get("embedding") in (None, config["embed_dim"]) and "timm_model_name" not in vision:
            found.append(name)
    return found


def _compare(found: Inspection, expert: Expert, suite: Suite) -> None:
    """Set the weights beside those of a suite's backbone, if they fit."""
    backbone = describe_backbone(suite.backbone, suite.pretrained)
    faults = expert_faults(expert, str(expert.path), backbone.shapes, backbone.activation)
    if faults:
        found.refused = "; ".join(faults)
        return
    encoder = VisionEncoder(load_clip(suite.backbone, suite.pretrained).visual)  # type: ignore[arg-type]
    base, linears = encoder.weights(), encoder.linears
    weights = expert.on(base)
    found.whole = distance(weights, base, base)
    found.changes = {linear: _change(weights, base, linear.weight) for linear in linears}
    spoiled = unusable(weights, FINITE)
    if spoiled:
        more = f" and {len(spoiled) - 3} more tensors" if len(spoiled) > 3 else ""
        found.refused = f"{', '.join(spoiled[:3])}{more}; fine-tune it again"
    else:
        found.refused = "; ".join(f"it {fault}" for fault in lineage_faults(expert, weights, base, linears))
    found.remarks = list(lineage_remarks(expert, weights, base))


def same_place(one: ExpertSource, other: ExpertSource) -> bool:
    """Whether two experts are one file, directory or repository."""
    if one.path is None or other.path is None:
        return one.hub == other.hub
    return one.path.resolve() == other.path.resolve()


def _change(weights: Weights, base: Weights, key: str) -> float:
    value = base[key].float()
    return float((weights[key].float() - value).norm() / value.norm().clamp(min=1e-30))
