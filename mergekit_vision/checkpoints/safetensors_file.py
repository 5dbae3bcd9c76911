"""safetensors files, read through a memory map and written whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_vision.checkpoints.base import CheckpointWeights
from mergekit_vision.errors import InputError
from mergekit_vision.support.files import replacing


class SafetensorsWeights(CheckpointWeights):
    """A safetensors file; tensors are views of the mapped file."""

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path}: not a readable safetensors file ({error}); copy or download it again") from error

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        file = self._opened()
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._opened().get_tensor(name)
        return tensor


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, whole or not at all.

    Args:
        path: file to write; an older one is replaced once the new one is complete.
        tensors: name -> tensor of any device and layout; tensors may share memory, each is stored in full.
        metadata: text stored in the header.
    """
    stored: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone(memory_format=torch.contiguous_format) if address in memory else plain
        memory.add(address)
    with replacing(path) as draft:
        save_file(stored, draft, {"format": "pt", **(metadata or {})})
