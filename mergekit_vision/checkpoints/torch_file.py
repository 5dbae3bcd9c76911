"""Files saved by ``torch.save`` and ``torch.jit.save``, read without running any code from the file."""

import io
import mmap
import zipfile
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_vision.checkpoints.container import Container, TensorInfo, damaged
from mergekit_vision.checkpoints.leaves import leaves
from mergekit_vision.checkpoints.pickles import LONGEST, UNREADABLE, RestrictedUnpickler
from mergekit_vision.checkpoints.stored import Storage, StoredTensor
from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import in_one_line

_NAME = "file saved by torch.save"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

JOINED = "join them by `python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIRECTORY FILE`"
"""What to do with shards of torch.distributed.checkpoint."""

Spans = dict[str, tuple[int, int]]
"""Name of a storage -> its first byte in the file, and how many there are."""


class TorchFile(Container):
    """A file of ``torch.save``; tensors are views of the mapped file, or copies where the file has them at odd places."""

    def read(self, name: str) -> Tensor:
        """One tensor by its name in the file."""
        tensor = self._tensors[name]
        if not tensor.extent:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        start, size = self._spans[tensor.key][0] + tensor.offset * tensor.dtype.itemsize, tensor.extent * tensor.dtype.itemsize
        content = self._opened()[start : start + size]
        content = content.clone() if start % tensor.dtype.itemsize else content
        return torch.empty(0, dtype=tensor.dtype).set_(content, 0, tensor.shape, tensor.stride)

    @abstractmethod
    def _unpickled(self) -> tuple[Any, Spans]:
        """The object in the file, and where its storages are."""

    def _open(self) -> Any:
        try:
            return torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=self.path.stat().st_size)
        except UnicodeEncodeError:  # torch opens no file whose name is not UTF-8; this takes a descriptor as long as it is open
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.path}: cannot be read ({in_one_line(error)})") from error

    def _read_entries(self) -> dict[str, TensorInfo]:
        try:
            content, self._spans = self._unpickled()
            found = dict(leaves(content))
            self._tensors = {name: value for name, value in found.items() if isinstance(value, StoredTensor)}
            _check(self._tensors.values(), self._spans, self.path.stat().st_size)
        except InputError:
            raise
        except (*UNREADABLE, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            raise damaged(self.path, _NAME, error) from error
        self.values = {name: value for name, value in found.items() if name not in self._tensors}
        return {name: TensorInfo(part.shape, str(part.dtype).removeprefix("torch.")) for name, part in self._tensors.items()}


class TorchArchive(TorchFile):
    """A zip archive of ``torch.save`` (PyTorch 1.6 or newer) or ``torch.jit.save``."""

    kind = "torch.save archive"

    def _unpickled(self) -> tuple[Any, Spans]:
        with zipfile.ZipFile(self.path) as archive:
            _refuse_several(self.path, archive)
            names = archive.namelist()
            root = next((name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl")), None)
            if root is None:
                raise ValueError("a zip archive without data.pkl")
            if len(set(names)) < len(names):
                raise ValueError("a zip archive with several records of one name")
            if any("/code/" in name for name in names):
                self.kind = "TorchScript archive"
            if f"{root}byteorder" in names and _record(archive, f"{root}byteorder") != b"little":
                raise ValueError("written on a big-endian machine")
            content = RestrictedUnpickler(io.BytesIO(_record(archive, f"{root}data.pkl"))).load()
            return content, _spans(self.path, archive, f"{root}data/")


class LegacyTorchFile(TorchFile):
    """A file of ``torch.save`` from before PyTorch 1.6: several pickles, and behind them one storage after the other."""

    kind = "torch.save file from before PyTorch 1.6"

    def _unpickled(self) -> tuple[Any, Spans]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), min(size, LONGEST), access=mmap.ACCESS_READ) as stream:
            pickles = _Pickles(stream)
            if pickles.load() != _LEGACY_MAGIC:
                raise ValueError("a pickle that torch.save did not write")
            pickles.load()  # of the version
            machine = pickles.load()
            if isinstance(machine, dict) and not machine.get("little_endian", True):
                raise ValueError("written on a big-endian machine")
            content, keys = pickles.load(), pickles.load()
            spans, start = {}, stream.tell()
            for key in keys:
                if not isinstance(key, str):  # as text, tuples in tuples would take years
                    raise ValueError("a storage without a name")
                file.seek(start)
                length = int.from_bytes(file.read(8), "little") * pickles.dtypes[key].itemsize
                spans[key] = (start + 8, length)
                start += 8 + length
        return content, spans


class _Pickles(RestrictedUnpickler):
    """Pickles behind each other; it keeps the dtype of each storage, of which the file has the number of elements."""

    def __init__(self, stream: mmap.mmap) -> None:
        super().__init__(stream)
        self.dtypes: dict[str, torch.dtype] = {}

    def persistent_load(self, pid: Any) -> Any:
        """A storage, or a class."""
        found = super().persistent_load(pid)
        if isinstance(found, Storage):
            self.dtypes[found.key] = found.dtype
        return found


def _refuse_several(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse archives behind each other, each with a tensor, of which the reader of zip files sees the last alone."""
    if min((record.header_offset for record in archive.infolist()), default=0) > 0:
        raise InputError(f"{path}: is a shard of torch.distributed.checkpoint, one of those in its directory; {JOINED}")


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record's content, if it is not compressed, as those of ``torch.save`` are, nor very long."""
    record = archive.getinfo(name)
    if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its records are compressed, which those of torch.save are not")
    if record.file_size > LONGEST:
        raise ValueError(f"its objects take {record.file_size / 1e6:,.0f} MB without the tensors, too much to be read safely")
    return archive.read(record)


def _spans(path: Path, archive: zipfile.ZipFile, folder: str) -> Spans:
    """Where the storages of an archive are: behind their local headers, each with a name and a field of any lengths."""
    spans = {}
    with path.open("rb") as file:
        for record in archive.infolist():
            if not record.filename.startswith(folder):
                continue
            if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
                raise ValueError("its tensors are compressed or encrypted")
            file.seek(record.header_offset)
            header = file.read(30)
            lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            spans[record.filename.removeprefix(folder)] = (record.header_offset + 30 + sum(lengths), record.file_size)
    return spans


def _check(tensors: Any, spans: Spans, size: int) -> None:
    """Check that tensors lie within their storages, and those within the file."""
    for tensor in tensors:
        start, length = spans[tensor.key]
        end = (tensor.offset + tensor.extent) * tensor.dtype.itemsize if tensor.extent else 0
        if end > length or start + length > size:
            raise ValueError("a tensor reaches beyond what is stored")
