"""Experts and data already on disk, found by their task's name in the layouts that the field's repositories use."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_vision.support.paths import is_directory, is_file

_PLACES = ("", "{model}", "checkpoints/{model}", "single_task/{model}")
_FILES = (
    "{task}Val/nonlinear_finetuned.pt",  # TALL
    "{task}/nonlinear_finetuned.pt",
    "{task}/finetuned.pt",  # Task Arithmetic
    "{task}.safetensors",
    "{task}.pt",
    "{task}",  # a directory of transformers or peft
)
_PARQUET = ("{split}.parquet", "{split}-*.parquet", "data/{split}-*.parquet")
_DEFAULT_DATA: dict[str, dict[str, Any]] = {
    "val": {"split": "train", "part": "val"},
    "test": {"split": "test"},
    "train": {"split": "train", "part": "train"},
}


def find_expert(root: Path, names: Sequence[str], backbone: str) -> list[Path]:
    """Checkpoints of a task below a directory.

    Args:
        root: the directory.
        names: of the task.
        backbone: the suite's; checkpoints may lie below a directory with its name.
    """
    found = dict.fromkeys(path for path in _candidates(root, names, backbone) if _is_checkpoint(path))
    return list({_identity(path): path for path in found}.values())


def _candidates(root: Path, names: Sequence[str], backbone: str) -> Iterator[Path]:
    model = backbone.removesuffix("-quickgelu")
    for name in names:
        for place in _PLACES if ":" not in model else _PLACES[:1]:
            for spelled in (model, model.replace("ViT", "VIT")):
                yield from (root / place.format(model=spelled) / file.format(task=name) for file in _FILES)


def _identity(path: Path) -> tuple[int, int]:
    """What two names of one file have in common, where upper and lower case are not told apart too."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_checkpoint(path: Path) -> bool:
    return is_file(path) or (is_directory(path) and any(any(path.glob(f"*{suffix}")) for suffix in (".safetensors", ".bin")))


def find_data(root: Path, names: Sequence[str], published: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sources of a task's splits below a directory: Parquet files or image folders named after the splits.

    A split that lies there is taken whole; ``val``, where it does not, is a part of ``train``.

    Args:
        root: the directory.
        names: of the task.
        published: split -> the source that it is replaced for; without any, the usual splits.
    """
    found = {}
    for split, source in (published or _DEFAULT_DATA).items():
        if (here := _Directories(root, names, source).find(split)) is not None:
            found[split] = here
    return found


class _Directories:
    """Where a split of a task may lie: in a directory with one of the task's names, or one named as its repository.

    Args:
        root: the directory that they lie in.
        names: of the task.
        source: the split's source elsewhere, whose columns and rule of division are kept.
    """

    def __init__(self, root: Path, names: Sequence[str], source: Mapping[str, Any]) -> None:
        repository = [str(source[key]) for key in ("hub", "name") if source.get(key)]
        self._places = [root / name for name in (*names, "/".join(repository), *repository[:1]) if name]
        self._root, self._source = root, source

    def find(self, split: str) -> dict[str, Any] | None:
        """The source of a split, or ``None``."""
        divided = "part" in self._source
        found = self._whole(split) if split != "train" else None
        if found is None:
            found = self._whole(self._source.get("split", "train" if divided else "test"))
            if found is not None and divided and self._whole("val") is None:
                found |= self._kept("part", "cap")
        if found is None and "torchvision" in self._source:
            return {**self._source, "args": {**self._source["args"], "root": str(self._root)}}
        return found

    def _whole(self, split: str) -> dict[str, Any] | None:
        for place in filter(is_directory, self._places):
            for pattern in (pattern.format(split=split) for pattern in _PARQUET):
                if any(place.glob(pattern)):
                    return {"parquet": str(place / pattern), **self._kept("image", "label")}
            if is_directory(place / split):
                return {"folder": str(place / split)}
        return None

    def _kept(self, *keys: str) -> dict[str, Any]:
        return {key: self._source[key] for key in keys if key in self._source}
