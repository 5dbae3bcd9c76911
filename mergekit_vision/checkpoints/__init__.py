"""Checkpoints of CLIP vision towers: what people have, read as lazy mappings of open_clip's keys to tensors."""

from mergekit_vision.checkpoints.expert import ExpertSource, open_expert, open_weights
from mergekit_vision.checkpoints.opening import SUFFIXES
from mergekit_vision.checkpoints.safetensors_file import save_safetensors
from mergekit_vision.checkpoints.weights import CheckpointWeights, Expert

__all__ = ["SUFFIXES", "CheckpointWeights", "Expert", "ExpertSource", "open_expert", "open_weights", "save_safetensors"]
