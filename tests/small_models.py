"""Merged models that are written quickly: nothing is merged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_vision.encoders.backbone import describe_backbone, load_clip
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.export.directory import save_model
from mergekit_vision.merger import MergeInputs
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.suites.suite import Suite

Save = Callable[[Path, float], None]
"""Writes a model into a directory, with some coefficient: a dynamic one where that is below 1."""

DYNAMIC, STATIC = 0.5, 2.0


def small_models(suite_file: Path) -> Save:
    """Models on the backbone of a suite, all with the same text tower of few words."""
    suite = Suite.load(suite_file)
    backbone, clip = describe_backbone(suite.backbone), load_clip(suite.backbone)
    weights = {name: value.clone() for name, value in clip.named_parameters()}
    encoder = VisionEncoder(clip.visual)  # type: ignore[arg-type]
    routed = SMILE(rank=2, gate_rank=1).merge(MergeInputs(encoder.weights(), suite.experts, encoder.linears)).routed

    def save(directory: Path, scale: float) -> None:
        scaled = {name: scale * value if name == "visual.proj" else value for name, value in weights.items()}
        save_model(directory, backbone, scaled, routed if scale < 1 else {}, record_at(scale))

    return save


def record_at(scale: float) -> dict[str, Any]:
    """What is recorded of a merge."""
    return {
        "suite": "tiny",
        "backbone": "local-dir:base",
        "pretrained": None,
        "experts": {"colors": "colors.safetensors", "grays": "grays.pt"},
        "merger": {"name": "SMILE", "recipe": "SMILE", "class_path": "mergekit_vision.plugins.smile.SMILE", "init_args": {}},
        "citation": [],
        "scale": scale,
        "search": [],
        "seconds": {"merge": 0.5, "search": 0.0},
        "versions": {"mergekit_vision": "0.1.0"},
    }
