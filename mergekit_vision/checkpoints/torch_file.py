"""State dicts saved by ``torch.save``, loaded without running any code from the file."""

import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_vision.checkpoints.base import CheckpointWeights
from mergekit_vision.errors import InputError
from mergekit_vision.support.allocator import release_freed_memory
from mergekit_vision.support.files import cache_dir


class TorchWeights(CheckpointWeights):
    """A state dict saved by ``torch.save``; tensors are views of the mapped file.

    Files from before PyTorch 1.6 (no zip archive) cannot be mapped. Such a file is loaded whole to read its shapes, and at the
    first access to a tensor once more, to be mapped as a temporary copy in the cache directory: none stays in memory.
    """

    def _open(self) -> dict[str, Tensor]:
        if self._mappable:
            return self._state_dict(self._load())
        try:
            cache_dir().mkdir(parents=True, exist_ok=True)
            # the mapping outlives the file's name
            with tempfile.TemporaryDirectory(dir=cache_dir(), ignore_cleanup_errors=True) as place:
                copy = Path(place) / "weights.pt"
                torch.save(self._state_dict(self._load()), copy)
                release_freed_memory()
                mapped: dict[str, Tensor] = torch.load(copy, map_location="cpu", weights_only=True, mmap=True)
                return mapped
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{self.path}: is in the format from before PyTorch 1.6, and cannot be copied to {cache_dir()} to be mapped "
                f"({error}); load it and save it again by torch.save"
            ) from error

    @property
    def _mappable(self) -> bool:
        return zipfile.is_zipfile(self.path)

    def _load(self) -> Any:
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mappable)
        except pickle.UnpicklingError as error:
            if "global" not in str(error).lower():  # as in "Unsupported global: GLOBAL torch.nn.Linear"
                raise self._damaged(error) from error
            raise InputError(
                f"{self.path}: holds Python objects, not only tensors, and loading it could run code from the file; "
                "load it where you trust it and save `model.state_dict()` instead of the model"
            ) from error
        except (EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
            raise self._damaged(error) from error
        except RuntimeError as error:
            if "TorchScript" in str(error):
                raise self._scripted() from error
            raise self._damaged(error) from error
        if isinstance(content, torch.jit.ScriptModule):  # PyTorch before 2.5 loads it
            raise self._scripted()
        return content

    def _scripted(self) -> InputError:
        return InputError(f"{self.path}: is a TorchScript archive; save `torch.jit.load(path).state_dict()` by torch.save")

    def _damaged(self, error: Exception) -> InputError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return InputError(f"{self.path}: truncated, damaged, or not saved by torch.save ({reason}); copy or download it again")

    def _state_dict(self, content: Any) -> dict[str, Tensor]:
        if isinstance(content, dict) and content:
            other = next(
                (name for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))), None
            )
            if other is None:
                return content
            found = f"its entry {other!r} is a {type(content[other]).__name__}"
        else:
            found = "it is empty" if isinstance(content, dict) else f"it holds a {type(content).__name__}"
        nested = "state_dict" in content if isinstance(content, dict) else False
        remedy = "save `checkpoint['state_dict']` alone" if nested else "save `model.state_dict()`"
        raise InputError(f"{self.path}: not a state dict (parameter name -> tensor): {found}; {remedy}")

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        if self._mappable:
            return {name: tuple(tensor.shape) for name, tensor in self._opened().items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in self._state_dict(self._load()).items()}
        release_freed_memory()
        return shapes

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._opened()[name]
        return tensor
