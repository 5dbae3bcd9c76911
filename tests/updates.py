"""Merged updates of whole small models against formulas."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import formulas
import torch
from safetensors.torch import load_file
from synthetic import INFOS, LINEARS, Zoo, relative_error, weight_key
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


def is_matrix(zoo: Zoo, key: str) -> bool:
    return zoo.base[key].dim() == 2


def uneven(tasks: int) -> Zoo:
    """Experts whose spectra fall at different rates."""
    zoo = Zoo(tasks=tasks)
    for t, expert in enumerate(zoo.experts.values()):
        for key, base in zoo.base.items():
            if base.dim() == 2:
                U, S, Vh = torch.linalg.svd(expert[key] - base, full_matrices=False)
                expert[key] = base + U @ torch.diag(S[0] * torch.logspace(0, -(t + 1) / 2, len(S))) @ Vh
    return zoo


def least(floor: float | None, rank: int) -> int | None:
    """Directions that a task keeps in any case."""
    return None if floor is None else -int(-floor * rank // 1)


def tsvm_formula(zoo: Zoo, rank: int | None = None, block: bool = False, floor: float | None = None) -> dict[str, Tensor]:
    """The merged update of the whole model; of the blocks' matrices only, or of all."""
    linears, found = {weight_key(linear) for linear in LINEARS}, {}
    for key, base in zoo.base.items():
        spectral = key in linears if block else is_matrix(zoo, key)
        deltas = zoo.delta64(key)
        found[key] = formulas.tsvm(deltas, rank, least(floor, min(base.shape) // zoo.tasks)) if spectral else deltas.mean(0)
        if spectral and rank is None and min(base.shape) // zoo.tasks == 0:
            found[key] = torch.zeros_like(base).double()
    return found


def esm_formula(
    zoo: Zoo,
    *,
    inter_layer: float = 2.0,
    out_proj: str = "tsvm",
    other: str = "tsvm",
    floor: float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """The merged update of the whole model."""
    expected, T = {}, zoo.tasks

    def tsvm(deltas: Tensor) -> Tensor:
        return formulas.tsvm(deltas, floor=least(floor, min(deltas.shape[1:]) // T))

    for key in zoo.base:
        deltas = zoo.delta64(key)
        expected[key] = tsvm(deltas) if is_matrix(zoo, key) and other == "tsvm" else deltas.mean(0)
    for linear in LINEARS:
        deltas, how = zoo.delta64(weight_key(linear)), out_proj if linear.endswith("out_proj") else "esd"
        rows = [zoo.rows(task, linear) for task in zoo.experts]
        own = {**options, "floor": least(floor, deltas.shape[1] // T)}
        methods = {"esd": partial(formulas.esm, **own), "tsvm": lambda d, _: tsvm(d)}
        expected[weight_key(linear)] = methods[how](deltas, rows) if how in methods else deltas.mean(0)
    for kind in ("in_proj", "out_proj", "c_fc", "c_proj"):
        keys = [weight_key(linear) for linear in LINEARS if linear.endswith(f".{kind}")]
        expected.update(zip(keys, formulas.inter_layer([expected[key] for key in keys], inter_layer), strict=True))
    return expected
