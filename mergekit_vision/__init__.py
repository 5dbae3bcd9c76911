"""Training-free merging of fine-tuned CLIP vision encoders."""

from typing import TYPE_CHECKING, Any

from mergekit_vision.errors import InputError
from mergekit_vision.version import __version__

if TYPE_CHECKING:
    from mergekit_vision.data import Proxies, VisionTasks
    from mergekit_vision.encoder import VisionEncoder
    from mergekit_vision.export import load
    from mergekit_vision.merger import Merged, MergeInputs, Merger
    from mergekit_vision.module import MergedCLIP
    from mergekit_vision.suite import Suite
    from mergekit_vision.trainer import Trainer

__all__ = [
    "InputError",
    "MergeInputs",
    "Merged",
    "MergedCLIP",
    "Merger",
    "Proxies",
    "Suite",
    "Trainer",
    "VisionEncoder",
    "VisionTasks",
    "__version__",
    "load",
]

_HOME = {
    "MergeInputs": "merger",
    "Merged": "merger",
    "MergedCLIP": "module",
    "Merger": "merger",
    "Proxies": "data",
    "Suite": "suite",
    "Trainer": "trainer",
    "VisionEncoder": "encoder",
    "VisionTasks": "data",
    "load": "export",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import mergekit_vision`` itself loads nothing heavy."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
