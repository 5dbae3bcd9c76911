"""Training-free merging of fine-tuned CLIP vision encoders."""

from typing import TYPE_CHECKING, Any

from mergekit_vision.errors import InputError
from mergekit_vision.version import __version__

if TYPE_CHECKING:
    from mergekit_vision.data.datamodule import VisionTasks
    from mergekit_vision.data.proxies import Proxies
    from mergekit_vision.encoders.vision import VisionEncoder
    from mergekit_vision.export.directory import load
    from mergekit_vision.merger import Merged, MergeInputs, Merger
    from mergekit_vision.runs.module import MergedCLIP
    from mergekit_vision.runs.trainer import Trainer
    from mergekit_vision.suites.suite import Suite

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
    "MergedCLIP": "runs.module",
    "Merger": "merger",
    "Proxies": "data.proxies",
    "Suite": "suites.suite",
    "Trainer": "runs.trainer",
    "VisionEncoder": "encoders.vision",
    "VisionTasks": "data.datamodule",
    "load": "export.directory",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: ``import mergekit_vision`` itself loads nothing heavy."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
