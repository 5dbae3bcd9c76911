"""Labeled image sources by a small mapping: Parquet files, the Hugging Face hub, an image folder, a torchvision data set.

======================================================  ===================================================================
mapping                                                 images
======================================================  ===================================================================
``{parquet: FILE_OR_GLOB}``                             local Parquet in the Hugging Face image schema
``{hub: ORG/NAME, split: S, name: N, revision: R}``     a data set on the hub or a local copy of one (extra ``hub``)
``{folder: DIRECTORY}``                                 one sub-directory a class, in alphabetical order
``{torchvision: CLASS_PATH, args: {…}}``                any map-style data set class yielding (PIL image, class index)
======================================================  ===================================================================

``parquet`` and ``hub`` take the column names ``image:`` and ``label:`` where they differ from those.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_vision.support.faults import closest

SourceConfig = Mapping[str, Any]
"""One source as it stands in a suite file; the module's text lists the kinds."""

_KEYS: dict[str, dict[str, type]] = {
    "parquet": {"parquet": str, "image": str, "label": str},
    "hub": {"hub": str, "split": str, "name": str, "revision": str, "image": str, "label": str},
    "folder": {"folder": str},
    "torchvision": {"torchvision": str, "args": dict},
}


def kind_of(config: SourceConfig) -> str:
    """The kind of a well-formed source: ``parquet``, ``hub``, ``folder`` or ``torchvision``."""
    return next(kind for kind in _KEYS if kind in config)


def is_fetched(config: SourceConfig) -> bool:
    """Whether a well-formed source may be downloaded when it is opened."""
    return kind_of(config) in {"hub", "torchvision"}


def config_faults(config: object) -> list[str]:
    """What is wrong with the layout of a source's mapping, one text a fault.

    >>> from mergekit_vision.sources.config import config_faults
    >>> config_faults({"parqet": "a.parquet"})
    ['unknown key `parqet` (did you mean `parquet`?); a source is one of parquet, hub, folder, torchvision']
    """
    if not isinstance(config, Mapping):
        return [f"must be a mapping such as `parquet: FILE`, not {config!r}"]
    kinds = [kind for kind in _KEYS if kind in config]
    if not kinds:
        hints = [f"unknown key `{key}`{closest(str(key), _KEYS)}" for key in config] or ["is empty"]
        return [f"{'; '.join(hints)}; a source is one of {', '.join(_KEYS)}"]
    if len(kinds) > 1:
        return [f"names more than one source: {', '.join(kinds)}; keep one"]
    known = _KEYS[kinds[0]]
    faults = [
        f"unknown key `{key}`{closest(str(key), known)}; known are {', '.join(known)}" for key in config if key not in known
    ]
    for key in config:
        if key in known and (not isinstance(config[key], known[key]) or config[key] == ""):
            faults.append(f"`{key}` must be a {'text' if known[key] is str else 'mapping'}, not {config[key]!r}")
    if kinds[0] == "hub" and "split" not in config:
        faults.append("`split` is missing; name the hub data set's split, such as `split: test`")
    return faults


def resolve(config: SourceConfig, root: Path) -> dict[str, Any]:
    """The same source with relative paths made absolute from ``root`` (a hub id only where it is a directory there)."""
    resolved = dict(config)
    for key in ("parquet", "folder"):
        if key in resolved:
            resolved[key] = str(root / Path(resolved[key]).expanduser())
    if "hub" in resolved and (root / resolved["hub"]).is_dir():
        resolved["hub"] = str(root / resolved["hub"])
    if isinstance(resolved.get("args"), Mapping) and isinstance(resolved["args"].get("root"), str):
        resolved["args"] = {**resolved["args"], "root": str(root / Path(resolved["args"]["root"]).expanduser())}
    return resolved
