"""Merged updates of whole small models against formulas."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file
from synthetic import INFOS, Zoo, relative_error
from tolerances import of_model
from torch import Tensor

from mergekit_vision.merger import MergeInputs

BLOCKS = {info.weight for info in INFOS}
"""Keys of the blocks' matrices."""
LIMIT = 1e-5
"""Whatever the condition, no update is off by more."""
REAL_KEYS = (
    "visual.proj",
    "visual.positional_embedding",
    "visual.transformer.resblocks.0.attn.in_proj_weight",
    "visual.transformer.resblocks.3.attn.out_proj.weight",
    "visual.transformer.resblocks.1.mlp.c_fc.weight",
    "visual.transformer.resblocks.5.mlp.c_proj.weight",
)


def matrices(zoo: Zoo, other: bool = True) -> set[str]:
    """Keys of all matrices, or of the blocks' alone."""
    return {key for key, value in zoo.base.items() if value.dim() == 2 and (other or key in BLOCKS)}


def assert_updates(found: Mapping[str, Tensor], formula: Callable[[Zoo], Mapping[str, Tensor]], zoo: Zoo) -> None:
    """Compare an update with a formula, as closely as float32 can know it; zero must be found exactly."""
    expected, bounds = formula(zoo), of_model(formula, zoo)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value.any():
            assert relative_error(found[key], value) <= min(bounds[key], LIMIT), key
        else:
            assert not found[key].any(), key


def real_inputs(zoo: Path, tasks: int = 5) -> MergeInputs:
    """Some matrices of real experts."""
    names = ("mnist", "kmnist", "gtsrb", "dtd10", "flowers5")[:tasks]
    experts = {name: load_file(zoo / "experts" / f"{name}.safetensors") for name in names}
    base = load_file(zoo / "base" / "open_clip_model.safetensors")
    return MergeInputs({key: base[key] for key in REAL_KEYS}, experts)
