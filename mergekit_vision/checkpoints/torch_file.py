"""Files saved by ``torch.save`` and ``torch.jit.save``, read without running any code from the file."""

import io
import pickle
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mergekit_vision.checkpoints.container import Container, TensorInfo, damaged
from mergekit_vision.checkpoints.pickles import STORAGES, UNREADABLE, RestrictedUnpickler, Storage, leaves
from mergekit_vision.errors import InputError
from mergekit_vision.support.allocator import release_freed_memory
from mergekit_vision.support.files import cache_dir

_NAME = "file saved by torch.save"


class TorchArchive(Container):
    """A zip archive of ``torch.save`` (PyTorch 1.6 or newer) or ``torch.jit.save``; tensors are views of the mapped file."""

    kind = "torch.save archive"

    def read(self, name: str) -> Tensor:
        """One tensor by its name in the file."""
        tensor: Tensor = self._opened()[name]
        return tensor

    def _open(self) -> dict[str, Tensor]:
        try:
            found = dict(leaves(_unpickled(self.path)))
        except (*UNREADABLE, zipfile.BadZipFile) as error:
            raise damaged(self.path, _NAME, error) from error
        tensors = {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}
        self.values = {name: value for name, value in found.items() if name not in tensors}
        return tensors

    def _read_entries(self) -> dict[str, TensorInfo]:
        entries = {name: _info(tensor) for name, tensor in self._opened().items()}
        with zipfile.ZipFile(self.path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                self.kind = "TorchScript archive"
        return entries


class LegacyTorchFile(Container):
    """A file of ``torch.save`` from before PyTorch 1.6, which cannot be mapped.

    It is loaded whole to see what is in it, and at the first access to a tensor once more, to be mapped as a temporary copy in
    the cache directory: none stays in memory.
    """

    kind = "torch.save file from before PyTorch 1.6"

    def read(self, name: str) -> Tensor:
        """One tensor by its name in the file."""
        tensor: Tensor = self._opened()[name]
        return tensor

    def _open(self) -> dict[str, Tensor]:
        try:
            cache_dir().mkdir(parents=True, exist_ok=True)
            # the mapping outlives the file's name
            with tempfile.TemporaryDirectory(dir=cache_dir(), ignore_cleanup_errors=True) as place:
                copy = Path(place) / "weights.pt"
                torch.save(self._load(), copy)
                release_freed_memory()
                return dict(leaves(_unpickled(copy)))
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{self.path}: is in the format from before PyTorch 1.6, and cannot be copied to {cache_dir()} to be mapped "
                f"({error}); load it and save it again by torch.save"
            ) from error

    def _read_entries(self) -> dict[str, TensorInfo]:
        entries = {name: _info(tensor) for name, tensor in self._load().items()}
        release_freed_memory()
        return entries

    def _load(self) -> dict[str, Tensor]:
        restricted = SimpleNamespace(
            Unpickler=RestrictedUnpickler,
            load=lambda stream, **options: RestrictedUnpickler(stream, **options).load(),
            UnpicklingError=pickle.UnpicklingError,
            __name__="restricted",
        )
        try:
            content = torch.load(self.path, map_location="cpu", pickle_module=restricted, weights_only=False)
            found = dict(leaves(content))
        except UNREADABLE as error:
            raise damaged(self.path, _NAME, error) from error
        self.values = {name: value for name, value in found.items() if not isinstance(value, Tensor)}
        return {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}


class _ArchiveUnpickler(RestrictedUnpickler):
    """The restricted reader of a zip archive, whose storages are slices of the mapped file."""

    def __init__(self, content: bytes, path: Path, records: dict[str, zipfile.ZipInfo], file: BinaryIO) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._records, self._file = records, file
        self._whole = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)

    def persistent_load(self, pid: Any) -> Storage:
        """The storage of tensors that is a record of the archive."""
        _, kind, key, _, _ = pid
        record = self._records[f"data/{key}"]
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its tensors are compressed")
        start = _data_offset(self._file, record)
        dtype = STORAGES.get(kind, torch.uint8)  # of quantized ones, which are stubs in the end
        return Storage(self._whole[start : start + record.file_size], dtype)


def _unpickled(path: Path) -> Any:
    """The object in a zip archive of PyTorch, made of tensors, plain containers and stubs."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        root = next((name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("a zip archive without data.pkl")
        records = {info.filename.removeprefix(root): info for info in archive.infolist()}
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise ValueError("written on a big-endian machine")
        return _ArchiveUnpickler(archive.read(records["data.pkl"]), path, records, file).load()


def _data_offset(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where a record's content begins in a zip archive: behind its local header, with a name and a field of any lengths."""
    file.seek(record.header_offset)
    header = file.read(30)
    return record.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
