"""safetensors files, read through a memory map and written whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_vision.checkpoints.container import Container, TensorInfo, damaged
from mergekit_vision.support.files import replacing

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class SafetensorsFile(Container):
    """A safetensors file; tensors are views of the mapped file."""

    kind = "safetensors"

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, "safetensors file", error) from error

    def _read_entries(self) -> dict[str, TensorInfo]:
        file = self._opened()
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return {name: TensorInfo(tuple(part.get_shape()), _dtype(part.get_dtype())) for name, part in slices.items()}

    def read(self, name: str) -> Tensor:
        """One tensor by its name in the file."""
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


def _dtype(name: str) -> str:
    return _DTYPES.get(name, name.lower())
