"""Checkpoint files of vision towers: each is a lazy mapping of open_clip key -> tensor."""

from pathlib import Path

from mergekit_vision.checkpoints.base import CheckpointWeights
from mergekit_vision.checkpoints.safetensors_file import SafetensorsWeights, save_safetensors
from mergekit_vision.checkpoints.torch_file import TorchWeights
from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import closest_file

__all__ = ["SUFFIXES", "CheckpointWeights", "SafetensorsWeights", "TorchWeights", "open_weights", "save_safetensors"]

SUFFIXES: dict[str, type[CheckpointWeights]] = {
    ".safetensors": SafetensorsWeights,
    ".pt": TorchWeights,
    ".pth": TorchWeights,
    ".bin": TorchWeights,
    ".ckpt": TorchWeights,
}
"""Suffix of a weights file -> its usual format; the content decides."""


def open_weights(path: str | Path) -> CheckpointWeights:
    """Open an expert's checkpoint; only its header is read.

    Args:
        path: a safetensors file, or a state dict saved by ``torch.save``. The content decides, then the suffix.

    Returns:
        A mapping of ``visual.…`` keys to tensors, each read when it is asked for.

    Raises:
        InputError: when the file is missing, is of another kind, is damaged, or is no state dict.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            start = stream.read(32)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}){closest_file(path)}") from error
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the weights themselves; run `git lfs pull` where it came from")
    kind = _sniff(start) or SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: neither safetensors nor a torch.save'd state dict (known suffixes: {', '.join(SUFFIXES)})")
    return kind(path)


def _sniff(start: bytes) -> type[CheckpointWeights] | None:
    """Format of a file by its first bytes: a zip or pickle opcode, or a length followed by a JSON header."""
    if start[8:9] == b"{":
        return SafetensorsWeights
    return TorchWeights if start.startswith((b"PK\x03\x04", b"\x80")) else None
