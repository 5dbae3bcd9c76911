"""Iso-C against its formula, written with plain SVDs in float64."""

import doctest
from collections.abc import Mapping

import pytest
import torch
from mergekit_vision_isotropic import Isotropic, isotropic, method
from torch import Tensor

from mergekit_vision import InputError, registry
from mergekit_vision.merger import LinearInfo, MergeInputs

SHAPES = {
    "visual.conv1.weight": (6, 3, 2, 2),
    "visual.proj": (6, 5),
    "visual.ln_post.bias": (6,),
    "visual.transformer.resblocks.0.attn.in_proj_weight": (18, 6),
    "visual.transformer.resblocks.0.mlp.c_proj.weight": (6, 24),
}
BLOCK = "visual.transformer.resblocks.0"
LINEARS = (
    LinearInfo(f"{BLOCK}.attn.in_proj", f"{BLOCK}.attn.in_proj_weight", None, "in_proj", 0),
    LinearInfo(f"{BLOCK}.mlp.c_proj", f"{BLOCK}.mlp.c_proj.weight", None, "c_proj", 0),
)


def made_up(tasks: int) -> MergeInputs:
    """A backbone and some experts with keys and shapes as a CLIP vision tower has them."""
    generator = torch.Generator().manual_seed(tasks)

    def random(size: float) -> dict[str, Tensor]:
        return {key: size * torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}

    base = random(1.0)
    changes = [random(0.01) for _ in range(tasks)]
    experts = {f"task{t}": {key: base[key] + change[key] for key in base} for t, change in enumerate(changes)}
    return MergeInputs(base, experts, LINEARS)


def by_formula(inputs: MergeInputs, flat: set[str]) -> Mapping[str, Tensor]:
    """``mean(Σ) U Vᵀ`` of the summed task vectors for the keys in ``flat``, their mean for the others; float64."""
    update = {}
    for key, value in inputs.base.items():
        deltas = torch.stack([expert[key] - value for expert in inputs.experts.values()]).double()
        if key in flat:
            U, S, Vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
            update[key] = U @ torch.diag(S.mean().expand(len(S))) @ Vh
        else:
            update[key] = deltas.mean(0)
    return update


@pytest.mark.parametrize("tasks", [1, 2, 7])
@pytest.mark.parametrize("other", ["isotropic", "mean"])
def test_the_formula(tasks: int, other: str) -> None:
    """Every parameter is that of the plain SVDs."""
    inputs = made_up(tasks)
    flat = {key for key in SHAPES if key.startswith("visual.transformer")}
    expected = by_formula(inputs, flat | {"visual.proj"} if other == "isotropic" else flat)
    merged = Isotropic(other=other).merge(inputs)  # type: ignore[arg-type]
    assert merged.scale == 1.0
    assert merged.update.keys() == expected.keys()
    for key, value in merged.update.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-7, msg=key)


def test_the_spectrum_is_flat_and_keeps_its_sum() -> None:
    """All singular values are equal, and add up to what they added up to before."""
    M = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = torch.linalg.svdvals(M), torch.linalg.svdvals(isotropic(M))
    torch.testing.assert_close(after, before.mean().expand(4))


def test_what_the_sum_does_not_reach_stays_zero() -> None:
    """A rank of 1 in a 3 x 2 matrix: the mean is over both singular values, and the null direction gets none of it."""
    M = torch.outer(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 4.0]))  # singular values 12 and 0
    torch.testing.assert_close(isotropic(M), M / 2)


def test_what_no_expert_changed_is_left_out() -> None:
    """An absent key keeps its pre-trained value."""
    inputs = made_up(2)
    for expert in inputs.experts.values():
        expert["visual.proj"] = inputs.base["visual.proj"].clone()  # type: ignore[index]
    assert SHAPES.keys() - Isotropic().merge(inputs).update.keys() == {"visual.proj"}


def test_a_wrong_parameter_is_refused() -> None:
    """The message names the parameter, its value and what it may be."""
    with pytest.raises(InputError, match="other is 'men', but must be one of isotropic, mean"):
        Isotropic(other="men")  # type: ignore[arg-type]


def test_the_examples_in_docstrings() -> None:
    """They print what they say."""
    found = doctest.testmod(method)
    assert found.attempted
    assert not found.failed


def test_the_registry_knows_it_by_name() -> None:
    """The package is installed, and its entry point works."""
    assert registry.get("Isotropic") is Isotropic
    assert registry.mergers()["Isotropic"] is Isotropic
