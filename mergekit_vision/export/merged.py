"""A merged model, opened to be exported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mergekit_vision.encoders.backbone import Backbone, describe_backbone, load_clip
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.export.manifest import MODEL
from mergekit_vision.routers import LowRankExperts


@dataclass(frozen=True)
class MergedModel:
    """A merged model with all that a writer may need.

    Attributes:
        directory: that it was read from, in open_clip's layout.
        record: what ``merge.json`` holds.
        backbone: open_clip's configuration of the model, and the shapes of its vision tower.
        clip: the open_clip model on the CPU, for its text tower; its vision tower is part of ``encoder``.
        encoder: the vision encoder with its routed experts, if any; float32, in evaluation mode.
        routed: Linear name -> routed experts; empty for a static model, and where only the base is exported.
    """

    directory: Path
    record: Mapping[str, Any]
    backbone: Backbone
    clip: nn.Module
    encoder: VisionEncoder
    routed: Mapping[str, LowRankExperts]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.encoder.visual.image_size  # type: ignore[misc]
        return int(height), int(width)

    @property
    def device(self) -> torch.device:
        """Of the encoder."""
        return next(self.encoder.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """Both towers' tensors by open_clip key, from the file; of a dynamic model, those of the static base."""
        return load_file(self.directory / MODEL)


def open_merged(directory: Path, record: Mapping[str, Any], routed: Mapping[str, LowRankExperts]) -> MergedModel:
    """Read a merged model.

    Args:
        directory: written by ``merge``.
        record: what its ``merge.json`` holds.
        routed: its experts, as :func:`~mergekit_vision.export.directory.load_experts` reads them; empty for the base alone.

    Raises:
        InputError: when it cannot be read.
    """
    name = f"local-dir:{directory}"
    clip = load_clip(name)
    encoder = VisionEncoder(clip.visual).eval()  # type: ignore[arg-type]
    encoder.route(routed)
    return MergedModel(directory, record, describe_backbone(name), clip, encoder.requires_grad_(False), routed)
