"""JSON files of plain values."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergekit_vision.errors import InputError
from mergekit_vision.support.files import replacing

_LARGEST = 64 << 20  # bytes; plain values of this package take a few thousand


def same(a: Any, b: Any) -> bool:
    """Whether two pieces of configuration say the same; JSON knows no tuples."""
    return to_json(a) == to_json(b)


def to_json(content: Any, in_order: bool = False) -> str:
    """JSON of one line, its keys sorted unless they are to stay ``in_order``; tensors and paths become plain values."""
    return json.dumps(content, sort_keys=not in_order, default=_jsonable)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON beside ``path`` and rename it there; tensors and paths become plain values."""
    with replacing(path) as draft:
        draft.write_text(indented(content), encoding="utf-8")


def indented(content: Mapping[str, Any]) -> str:
    """JSON as it stands in a file, a value a line."""
    return json.dumps(content, indent=2, default=_jsonable) + "\n"


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: when it is missing, cannot be read, or is no JSON.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: missing, or no file")
        if path.stat().st_size > _LARGEST:
            raise InputError(f"{path}: {path.stat().st_size} bytes are far too many for what belongs there")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def _jsonable(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)


def readable(value: Any) -> str:
    """A parameter as a reader would write it.

    >>> from mergekit_vision.support.json_files import readable
    >>> readable({"name": "ESM", "init_args": {"gain": 2.0, "rank": None}}), readable(["c_fc", "in_proj"])
    ('ESM(gain=2.0, rank=none)', 'c_fc, in_proj')
    >>> readable({"folder": "photos/", "skip": 2})
    'folder photos/, skip 2'
    """
    if isinstance(value, Mapping) and "init_args" in value:
        name = value.get("name") or value["class_path"]
        return f"{name}({', '.join(f'{key}={readable(item)}' for key, item in value['init_args'].items())})"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {readable(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(readable(item) for item in value)
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))
