"""Finding the weights in a path, and opening the file by its content."""

import stat
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_vision.checkpoints.container import Container, TensorInfo
from mergekit_vision.checkpoints.safetensors_file import SafetensorsFile
from mergekit_vision.checkpoints.torch_file import JOINED, LegacyTorchFile, TorchArchive
from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import closest_file
from mergekit_vision.support.json_files import read_json
from mergekit_vision.support.paths import is_file

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Usual suffixes of weights files; the content decides."""

ADAPTER_CONFIG = "adapter_config.json"

ROUTED = ("experts.safetensors", "experts.json")
"""Files of the routed experts in the directory of a dynamic merged model."""

_INDEX = ".index.json"  # end of the name of a file that says which other file holds which tensors

_WEIGHTS = (  # of a directory, the first that is there
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_ELSEWHERE = {  # a file that tells of weights in a form that is not read -> the remedy
    "zero_to_fp32.py": "it holds DeepSpeed's shards; run its zero_to_fp32.py and name the file that it writes",
    "mp_rank_*_model_states.pt": "it holds DeepSpeed's shards; run zero_to_fp32.py and name the file that it writes",
    "global_step*": "it holds DeepSpeed's shards; run zero_to_fp32.py and name the file that it writes",
    "*.distcp": f"it holds shards of torch.distributed.checkpoint; {JOINED}",
    "tf_model.h5": "it holds TensorFlow weights alone; load it by transformers with from_tf=True and save it again",
    "flax_model.msgpack": "it holds Flax weights alone; load it by transformers with from_flax=True and save it again",
}


class ShardedFiles(Container):
    """Files of one model, with an index in JSON that says which holds what."""

    def __init__(self, path: Path) -> None:
        index = read_object(path).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(part, str) for part in index.values()):
            raise InputError(f"{path}: has no `weight_map` of names to files; copy or download it again")
        outside = next((part for part in index.values() if Path(part).name != part or part.endswith(_INDEX)), None)
        if outside is not None:
            raise InputError(
                f"{path}: names the file {outside!r}, which is not one of weights beside it; copy or download it again"
            )
        self._index: dict[str, str] = index
        self._parts = {part: open_container(path.parent / part) for part in dict.fromkeys(index.values())}
        super().__init__(path)
        self.kind = f"{next(iter(self._parts.values())).kind} in {len(self._parts)} files" if self._parts else "no files"

    @property
    def files(self) -> tuple[Path, ...]:
        """The index and the files that it names."""
        return (self.path, *(part.path for part in self._parts.values()))

    def read(self, name: str) -> Tensor:
        """One tensor by its name."""
        return self._parts[self._index[name]].read(name)

    def _read_entries(self) -> dict[str, TensorInfo]:
        lost = [name for name, part in self._index.items() if name not in self._parts[part].entries]
        if lost:
            raise InputError(f"{self.path}: {self._index[lost[0]]} lacks {lost[0]}, which it should hold; download it again")
        return {name: self._parts[part].entries[name] for name, part in self._index.items()}

    def _open(self) -> None:
        """Each part opens itself."""


def weights_file(path: Path) -> Path:
    """The file that holds the weights: ``path`` itself, or the one of that directory.

    Raises:
        InputError: when there is none, or several and none has a usual name.
    """
    if not path.is_dir():
        return path
    names = _ADAPTER_WEIGHTS if (path / ADAPTER_CONFIG).is_file() else _WEIGHTS
    known = next((path / name for name in names if (path / name).is_file()), None)
    if known is not None:
        return known
    remedy = next((remedy for pattern, remedy in _ELSEWHERE.items() if any(path.glob(pattern))), None)
    if remedy is not None:
        raise InputError(f"{path}: {remedy}")
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(found) == 1:
        return found[0]
    problem = f"several files may hold the weights ({', '.join(file.name for file in found[:4])} …)" if found else "no weights"
    raise InputError(f"{path}: {problem} in this directory; name the file, or one called {' or '.join(names[:3])}")


def check_static(path: Path) -> None:
    """Refuse the directory of a dynamic merged model, of which the weights are only what all routes share.

    Raises:
        InputError: for such a directory.
    """
    if all(is_file(path / name) for name in ROUTED):
        raise InputError(f"{path}: a dynamic merged model, of which this would be the static base alone; name a static one")


def open_container(path: Path) -> Container:
    """Open a checkpoint file; only its header is read. The content decides what it is, never the suffix.

    Raises:
        InputError: when the file is missing, is of another kind, or is damaged.
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            with path.open("rb") as stream:
                start = stream.read(32)
        else:
            start = None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path}: cannot be read ({reason}){closest_file(path)}") from error
    if start is None:
        raise InputError(f"{path}: not a file of weights, nor a directory with one")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the weights themselves; run `git lfs pull` where it came from")
    if path.name.endswith(_INDEX):
        return ShardedFiles(path)
    if start[8:9] == b"{":  # behind the length of a JSON header
        return SafetensorsFile(path)
    if start.startswith(b"PK\x03\x04"):
        return TorchArchive(path)
    if start.startswith(b"\x80"):  # a pickle's first opcode
        return LegacyTorchFile(path)
    remedy = next(
        (remedy for pattern, remedy in _ELSEWHERE.items() if path.match(pattern)), "truncated, damaged, or of another kind"
    )
    raise InputError(f"{path}: neither safetensors nor saved by torch.save; {remedy}")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside weights.

    Raises:
        InputError: when there is none.
    """
    try:
        content = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; copy or download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a JSON object; copy or download it again")
    return content
