"""JSON files of plain values."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergekit_vision.support.files import replacing


def same(a: Any, b: Any) -> bool:
    """Whether two pieces of configuration say the same; JSON knows no tuples."""
    return to_json(a) == to_json(b)


def to_json(content: Any, in_order: bool = False) -> str:
    """JSON of one line, its keys sorted unless they are to stay ``in_order``; tensors and paths become plain values."""
    return json.dumps(content, sort_keys=not in_order, default=_jsonable)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON beside ``path`` and rename it there; tensors and paths become plain values."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, indent=2, default=_jsonable) + "\n")


def _jsonable(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)


def readable(value: Any) -> str:
    """A parameter as a reader would write it.

    >>> from mergekit_vision.support.json_files import readable
    >>> readable({"name": "ESM", "init_args": {"gain": 2.0, "rank": None}}), readable(["c_fc", "in_proj"])
    ('ESM(gain=2.0, rank=none)', 'c_fc, in_proj')
    """
    if isinstance(value, Mapping) and "init_args" in value:
        return f"{value['name']}({', '.join(f'{key}={readable(item)}' for key, item in value['init_args'].items())})"
    if isinstance(value, list | tuple):
        return ", ".join(readable(item) for item in value)
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))
