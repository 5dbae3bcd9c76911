"""``open_clip``: a plain model directory of open_clip."""

from pathlib import Path

from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.encoders.backbone import load_clip
from mergekit_vision.encoders.config import CONFIG
from mergekit_vision.export.directory import open_clip_config, save_tokenizer
from mergekit_vision.export.manifest import MODEL
from mergekit_vision.export.merged import MergedModel
from mergekit_vision.export.writer import Embed, Writer
from mergekit_vision.support.json_files import write_json


class OpenClip(Writer):
    """What ``open_clip.create_model_and_transforms("local-dir:…")`` loads: both towers, without the record of the merge."""

    def write(self, model: MergedModel, directory: Path) -> None:
        """Write both towers."""
        save_safetensors(directory / MODEL, model.weights())
        write_json(directory / CONFIG, open_clip_config(model.backbone))
        save_tokenizer(directory, model.backbone)

    def load(self, directory: Path) -> Embed:
        """Load it by ``open_clip.create_model``."""
        return load_clip(f"local-dir:{directory}").encode_image  # type: ignore[return-value]
