"""What has to be done to an image before an exported graph takes it."""

from pathlib import Path

from mergekit_vision.export.merged import MergedModel
from mergekit_vision.support.json_files import write_json

PREPROCESSING = "preprocess.json"


def write_preprocessing(model: MergedModel, directory: Path) -> None:
    """Write ``preprocess.json``: size ``[H, W]``, color mode, mean, std, interpolation, resize mode and fill color."""
    write_json(directory / PREPROCESSING, {**model.backbone.preprocess, "size": list(model.image_size)})
