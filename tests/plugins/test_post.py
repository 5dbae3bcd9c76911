"""Methods that change what another one has merged, against their formulas; and all of them in a row."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from synthetic import LINEARS, Zoo, relative_error, weight_key
from tolerances import eps, from_gram, subspace, summed
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.merger import LinearInfo, Merged, MergeInputs, Merger, NormInfo, merged_weights
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.dare import DARE
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.lines import LiNeS
from mergekit_vision.plugins.spectrum import Isotropize, SubspaceBoosting
from mergekit_vision.plugins.svc import SVC
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.trim import Trim
from mergekit_vision.plugins.tsvm import TSVM

POST: list[Callable[..., Merger]] = [LiNeS, SVC, SubspaceBoosting, Isotropize]
HOMOGENEOUS: list[Callable[..., Merger]] = [LiNeS, SubspaceBoosting, Isotropize]
BLOCKS = {weight_key(linear) for linear in LINEARS}
KEY = weight_key(LINEARS[2])
TARGET = 1e-5
"""Relative error that is asked for, however badly conditioned a matrix is."""
NULL = 1e-6
"""Singular values below this share of the largest are round-off of a float32 matrix; an SVD's directions there are arbitrary."""

every_post = pytest.mark.parametrize("post", POST)
every_homogeneous = pytest.mark.parametrize("post", HOMOGENEOUS)
every_base = pytest.mark.parametrize(
    "base", [TaskArithmetic(), TIES(), TSVM(scale_average=False), ESM()], ids=lambda base: type(base).__name__
)


def is_spectral(key: str, value: Tensor, other: str) -> bool:
    return value.dim() == 2 and (key in BLOCKS or other == "same")


def thin(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD, without null directions."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    kept = NULL * S[0] < S
    return U[:, kept], S[kept], Vh[kept]


def spectrum_bound(M: Tensor) -> float:
    """Of a function of the singular values: the result rounds to float32, the rest is found from a float64 Gram matrix."""
    S = thin(M)[1]
    return min(TARGET, 4 * eps() + from_gram(float(S[0] / S[-1])))


def directions_bound(M: Tensor) -> float:
    """Of what depends on the single directions, which are known the worse the nearer their singular values are."""
    S = thin(M)[1]
    gaps = S[:-1].square() - S[1:].square()
    between = [float(gap) for gap, distance in zip(gaps, S[:-1] - S[1:], strict=True) if distance > NULL * S[0]]
    return min(TARGET, 4 * eps() + subspace(len(M), float(S[0] ** 2), min(between, default=float(S[0] ** 2))))


def frozen(tasks: int) -> Zoo:
    """A model in which no expert changed some parameters."""
    zoo = Zoo(tasks=tasks)
    for expert in zoo.experts.values():
        expert.update({key: zoo.base[key].clone() for key in ("visual.proj", weight_key(LINEARS[1]))})
    return zoo


# --- all of them


@every_post
def test_without_a_base_it_builds_on_the_sum(post: Callable[..., Merger]) -> None:
    inputs = Zoo(tasks=3).inputs()
    found, expected = post().merge(inputs), post(base=TaskArithmetic()).merge(inputs)
    assert (found.scale, found.fixed) == (expected.scale, expected.fixed)
    assert all(found.update[key].equal(value) for key, value in expected.update.items())


@every_homogeneous
@every_base
def test_coefficient_and_what_is_fixed_are_the_bases(post: Callable[..., Merger], base: Merger) -> None:
    inputs = Zoo(tasks=3).inputs()
    found, expected = post(base=base).merge(inputs), base.merge(inputs)
    assert (found.scale, found.fixed, found.update.keys()) == (expected.scale, expected.fixed, expected.update.keys())


class Doubled(Merger):
    """Another merger's model at half of the coefficient, written down twice as large."""

    def __init__(self, base: Merger) -> None:
        self.base = base

    def merge(self, inputs: MergeInputs) -> Merged:
        merged = self.base.merge(inputs)
        update = {key: value if key in merged.fixed else 2 * value for key, value in merged.update.items()}
        return replace(merged, update=update, scale=merged.scale / 2)


@every_homogeneous
@every_base
def test_they_scale_with_the_base(post: Callable[..., Merger], base: Merger) -> None:
    """So that a coefficient found for the result means what it means for the base."""
    zoo = Zoo(tasks=3)
    models = [merged_weights(zoo.base, post(base=how).merge(zoo.inputs())) for how in (base, Doubled(base))]
    assert all(torch.equal(models[0][key], models[1][key]) for key in zoo.base), "powers of two do not round"


@every_post
def test_keys_that_the_base_leaves_out_stay_out(post: Callable[..., Merger]) -> None:
    zoo = frozen(tasks=3)
    update = post(base=TSVM()).merge(zoo.inputs()).update
    assert update.keys() == zoo.base.keys() - {"visual.proj", weight_key(LINEARS[1])}
    assert all(value.isfinite().all() for value in post().merge(zoo.inputs()).update.values()), "or are zero"


@every_post
def test_nothing_stays_nothing(post: Callable[..., Merger]) -> None:
    update = post().merge(Zoo(tasks=3, change=0.0).inputs()).update
    assert all(not value.any() for value in update.values())


@every_post
def test_a_base_with_routed_experts_is_refused(post: Callable[..., Merger]) -> None:
    with pytest.raises(InputError, match="ESMPP has routed experts"):
        post(base=ESMPP(base=Average(), rank=2)).merge(Zoo(tasks=2).inputs())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LiNeS(alpha=-1.0), "LiNeS: alpha is -1.0"),
        (lambda: LiNeS(alpha=float("inf")), "LiNeS: alpha is inf"),
        (lambda: LiNeS(beta=-0.5), "LiNeS: beta is -0.5"),
        (lambda: LiNeS(beta=float("nan")), "LiNeS: beta is nan"),
        (lambda: LiNeS(outer="last"), "LiNeS: outer is 'last'"),
        (lambda: SVC(alpha=0.0), "SVC: alpha is 0.0"),
        (lambda: SVC(alpha=float("nan")), "SVC: alpha is nan"),
        (lambda: SVC(other="mean"), "SVC: other is 'mean'"),
        (lambda: SubspaceBoosting(beta=1.5), "SubspaceBoosting: beta is 1.5"),
        (lambda: SubspaceBoosting(beta=-0.1), "SubspaceBoosting: beta is -0.1"),
        (lambda: SubspaceBoosting(other="all"), "SubspaceBoosting: other is 'all'"),
        (lambda: Isotropize(other="mean"), "Isotropize: other is 'mean'"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make()


# --- LiNeS

DEPTH = 12


def deep(tasks: int = 2) -> MergeInputs:
    """Twelve blocks, of which a block's scale is a parameter that the encoder does not name."""
    shapes = {"visual.proj": (4, 3), "visual.ln_pre.weight": (4,), "visual.class_embedding": (4,)}
    linears, norms = [], []
    for block in range(DEPTH):
        start = f"visual.transformer.resblocks.{block}"
        shapes |= {f"{start}.ls_1.gamma": (4,), f"{start}.attn.in_proj_weight": (12, 4), f"{start}.attn.in_proj_bias": (12,)}
        shapes |= {f"{start}.ln_1.weight": (4,), f"{start}.ln_1.bias": (4,)}
        in_proj = f"{start}.attn.in_proj"
        linears.append(LinearInfo(in_proj, f"{in_proj}_weight", f"{in_proj}_bias", "in_proj", block))
        norms.append(NormInfo(f"{start}.ln_1", f"{start}.ln_1.weight", f"{start}.ln_1.bias", block))
    shapes |= {"visual.ln_post.weight": (4,), "visual.ln_post.bias": (4,)}
    generator = torch.Generator().manual_seed(0)
    base = {key: torch.zeros(shape) for key, shape in shapes.items()}
    experts = {f"task{t}": {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} for t in range(tasks)}
    behind = dict.fromkeys(("visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"), DEPTH)
    depths = {key: int(key.split(".")[3]) if "resblocks" in key else behind.get(key, -1) for key in shapes}
    return MergeInputs(base, experts, tuple(linears), norms=tuple(norms), depths=depths)


def depth(key: str) -> float:
    """As the published code finds it, by the number in the key."""
    numbers = [int(part) for part in key.split(".") if part.isdigit()]
    return numbers[0] / (DEPTH - 1) if numbers else 0.0


def published(inputs: MergeInputs, tau: dict[str, Tensor], coefficient: float) -> dict[str, Tensor]:
    """LiNeS of a merged task vector at a coefficient, in float64."""
    mean = {key: inputs.deltas(key).double().mean(0) for key in inputs.base}
    alpha = sum(value.abs().sum() for value in mean.values()) / sum(value.double().abs().sum() for value in tau.values())
    return {key: (alpha + coefficient * depth(key)) * value.double() for key, value in tau.items()}


@pytest.mark.parametrize("base", [TaskArithmetic(), TIES(), Average(), TSVM()], ids=lambda base: type(base).__name__)
@pytest.mark.parametrize("tasks", [1, 3])
def test_lines(base: Merger, tasks: int) -> None:
    inputs, merged = deep(tasks), base.merge(deep(tasks))
    found = merged_weights(inputs.base, LiNeS(base=base).merge(inputs))
    expected = published(inputs, dict(merged.update), merged.scale)
    for key in inputs.base:
        assert (found[key] - expected[key]).norm() <= summed(3 + tasks) * expected[key].norm(), key


def test_lines_of_the_sum_starts_at_the_average() -> None:
    inputs = deep(4)
    found = merged_weights(inputs.base, LiNeS().merge(inputs))
    for key in inputs.base:
        factor = 1 / 4 + 0.3 * depth(key)
        assert relative_error(found[key], factor * inputs.deltas(key).double().sum(0)) < summed(7), key


def test_lines_with_factors_of_its_own() -> None:
    inputs = deep()
    merged, found = Average().merge(inputs), LiNeS(base=Average(), alpha=0.5, beta=2.0).merge(inputs)
    for key, value in merged.update.items():
        assert relative_error(found.update[key], (0.5 + 2 * depth(key)) * value.double()) < summed(2), key


def test_lines_behind_the_last_block() -> None:
    """The published code gives the projection the smallest factor of all; by depth it gets the largest."""
    inputs = deep()
    sums = TaskArithmetic().merge(inputs).update
    for outer, factor in (("first", 0.5), ("depth", 1.5)):
        update = LiNeS(alpha=0.5, outer=outer).merge(inputs).update
        for key in ("visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"):
            assert update[key].equal(factor * sums[key])
        assert update["visual.ln_pre.weight"].equal(0.5 * sums["visual.ln_pre.weight"])
        assert update["visual.class_embedding"].equal(0.5 * sums["visual.class_embedding"])


def test_lines_with_what_the_base_holds_fixed() -> None:
    """It counts with coefficient 1 towards the magnitude, whatever the coefficient of the rest."""
    zoo = Zoo(tasks=3)
    inputs, merged = zoo.inputs(), replace(ESM().merge(zoo.inputs()), scale=0.5)
    whole = sum(float(merged.coefficient(key) * value.double().abs().sum()) for key, value in merged.update.items())
    alpha = sum(float(inputs.deltas(key).double().mean(0).abs().sum()) for key in inputs.base) / whole

    class Halved(ESM):
        def merge(self, inputs: MergeInputs) -> Merged:
            return merged

    update = LiNeS(base=Halved()).merge(inputs).update
    for key, value in merged.update.items():
        factor = alpha + ("resblocks.1." in key)
        assert relative_error(update[key], factor * value.double()) < summed(4), key


def test_lines_without_blocks_scales_all_alike() -> None:
    inputs = replace(Zoo(tasks=2).inputs(), linears=(), norms=(), depths={})
    sums, update = TaskArithmetic().merge(inputs).update, LiNeS(alpha=0.25).merge(inputs).update
    assert all(update[key].equal(value / 4) for key, value in sums.items())


def test_lines_of_a_single_block() -> None:
    inputs = Zoo(tasks=2).inputs()
    inputs = replace(
        inputs, linears=inputs.linears[:4], norms=(), depths=dict.fromkeys(("visual.proj", "visual.ln_post.weight"), 1)
    )
    sums, update = TaskArithmetic().merge(inputs).update, LiNeS(alpha=0.25, outer="depth").merge(inputs).update
    for key, value in sums.items():
        assert update[key].equal((1.25 if key in ("visual.proj", "visual.ln_post.weight") else 0.25) * value), key


# --- SVC


def svc(deltas: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """Direction by direction, as published; or space by space, where directions have one singular value."""
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    spaces: list[list[int]] = [[0]]
    for r in range(1, len(S)):
        if S[r - 1] - S[r] > NULL * S[0]:
            spaces.append([])
        spaces[-1].append(r)
    result = torch.zeros_like(merged)
    for space in spaces:
        rows = U[:, space].T @ merged
        tasks = [U[:, space].T @ delta for delta in deltas]
        shares = [float((rows * own).sum()) / float((own * own).sum()) for own in tasks]
        gamma = len(deltas) / sum(max(alpha, share) for share in shares)
        result += gamma * U[:, space] @ torch.diag(S[space]) @ Vh[space]
    return result


@pytest.mark.parametrize("alpha", [None, 0.1, 1.0])
@pytest.mark.parametrize("other", ["same", "keep"])
@every_base
def test_svc(base: Merger, other: str, alpha: float | None) -> None:
    zoo = Zoo(tasks=3)
    merged, found = base.merge(zoo.inputs()), SVC(base=base, alpha=alpha, other=other).merge(zoo.inputs())
    assert (found.scale, found.fixed, found.update.keys()) == (1.0, merged.fixed, merged.update.keys())
    least = 1 / 3 if alpha is None else alpha
    for key, value in merged.update.items():
        if not is_spectral(key, value, other):
            assert relative_error(found.update[key], merged.coefficient(key) * value.double()) < summed(1)
            continue
        inputs = zoo.delta64(key), value.double()
        assert relative_error(found.update[key], svc(*inputs, least)) < directions_bound(value.double()), key


def test_svc_of_one_task_is_that_task() -> None:
    zoo = Zoo(tasks=1)
    update = SVC().merge(zoo.inputs()).update
    for key in BLOCKS:
        assert relative_error(update[key], zoo.delta64(key)[0]) < TARGET


def test_svc_of_identical_tasks_is_that_task() -> None:
    """Whatever the coefficient: a direction that all share was counted once a task."""
    zoo = Zoo(tasks=4)
    zoo.experts = dict.fromkeys(zoo.experts, zoo.experts["task0"])
    for base in (TaskArithmetic(), Average(), Doubled(TaskArithmetic())):
        update = SVC(base=base).merge(zoo.inputs()).update
        for key in BLOCKS:
            assert relative_error(update[key], zoo.delta64(key)[0]) < TARGET


def test_svc_of_tasks_without_a_common_direction() -> None:
    """A direction that only one of T tasks has is divided by the mean of one and T - 1 times ``alpha``."""
    deltas = torch.diag_embed(torch.eye(3))[:, :, :3] * torch.tensor([3.0, 2.0, 1.0])[:, None, None]
    experts = {str(t): {KEY: delta} for t, delta in enumerate(deltas)}
    inputs = MergeInputs({KEY: torch.zeros(3, 3)}, experts, Zoo(tasks=1).inputs().linears)
    found = SVC(alpha=0.25).merge(inputs).update[KEY]
    torch.testing.assert_close(found, deltas.sum(0) * 3 / 1.5)


def test_svc_of_a_flat_spectrum_depends_on_no_basis() -> None:
    """All of the space has one singular value: one factor, for which no direction is needed."""
    zoo = Zoo(tasks=3)
    merged = Isotropize(base=Average()).merge(zoo.inputs()).update
    found = SVC(base=Isotropize(base=Average()), alpha=1e-3).merge(zoo.inputs()).update
    for key in (weight_key(LINEARS[1]), weight_key(LINEARS[3])):  # no wider than long: the left space is everything
        deltas, M = zoo.delta64(key), merged[key].double()
        shares = [max(1e-3, float((M * delta).sum() / delta.square().sum())) for delta in deltas]
        assert relative_error(found[key], 3 / sum(shares) * M) < TARGET


@pytest.mark.parametrize("base", [ESM(), Isotropize()])
def test_svc_does_not_depend_on_round_off(base: Merger) -> None:
    """Tasks in another order make the merged matrix round otherwise, and an SVD choose other directions."""
    zoo = Zoo(tasks=4)
    one, other = (SVC(base=base).merge(zoo.inputs(order)).update for order in (None, [3, 1, 0, 2]))
    for key in BLOCKS:
        assert relative_error(other[key], one[key].double()) < TARGET, key


# --- spectra


def boosted(M: Tensor, beta: float) -> Tensor:
    U, S, Vh = thin(M)
    first = next(j for j in range(len(S)) if j == len(S) - 1 or S[: j + 1].sum() >= beta * S.sum())
    return U @ torch.diag(torch.maximum(S, S[first])) @ Vh


def flat(M: Tensor) -> Tensor:
    U, S, Vh = thin(M)
    return U @ Vh * (S.sum() / min(M.shape))


@every_base
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.3, 0.8])
@pytest.mark.parametrize("other", ["same", "keep"])
def test_subspace_boosting(base: Merger, beta: float, other: str) -> None:
    zoo = Zoo(tasks=3)
    merged, found = base.merge(zoo.inputs()), SubspaceBoosting(base=base, beta=beta, other=other).merge(zoo.inputs())
    for key, value in merged.update.items():
        if is_spectral(key, value, other):
            assert relative_error(found.update[key], boosted(value.double(), beta)) < spectrum_bound(value.double()), key
        else:
            assert found.update[key].equal(value)


def test_subspace_boosting_of_everything_changes_nothing() -> None:
    zoo = Zoo(tasks=3)
    update = SubspaceBoosting(base=Average(), beta=1.0).merge(zoo.inputs()).update
    for key in zoo.base:
        assert relative_error(update[key], zoo.delta64(key).mean(0)) < TARGET


@every_base
@pytest.mark.parametrize("other", ["same", "keep"])
def test_isotropize(base: Merger, other: str) -> None:
    zoo = Zoo(tasks=3)
    merged, found = base.merge(zoo.inputs()), Isotropize(base=base, other=other).merge(zoo.inputs())
    for key, value in merged.update.items():
        if is_spectral(key, value, other):
            assert relative_error(found.update[key], flat(value.double())) < spectrum_bound(value.double()), key
        else:
            assert found.update[key].equal(value)


@pytest.mark.parametrize("post", [SubspaceBoosting(base=Average()), Isotropize(base=Average())])
def test_directions_that_a_matrix_does_not_have_stay_out(post: Merger) -> None:
    """An SVD picks some at random there, which would be raised like any other."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(24, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    inputs = MergeInputs({KEY: torch.zeros(24, 24)}, {"a": {KEY: low}}, Zoo(tasks=1).inputs().linears)
    found = post.merge(inputs).update[KEY].double()
    values = torch.linalg.svdvals(found)
    assert int((values > 1e-5 * values[0]).sum()) == 3


# --- in a row


def test_three_in_a_row() -> None:
    """Merge, scale by depth, flatten: each on what the one inside of it has made."""
    zoo = Zoo(tasks=3)
    inputs = zoo.inputs()
    found = Isotropize(base=LiNeS(base=Trim(base=TIES(density=1.0)), alpha=0.5)).merge(inputs)
    merged = TIES().merge(inputs)
    assert found.scale == merged.scale
    for key, value in merged.update.items():
        expected = (0.5 + ("resblocks.1." in key)) * value.double()
        expected = flat(expected) if value.dim() == 2 else expected
        bound = spectrum_bound(value.double()) if value.dim() == 2 else summed(3)
        assert relative_error(found.update[key], expected) < bound, key


@pytest.mark.parametrize("post", [LiNeS, SubspaceBoosting, Isotropize])
def test_before_and_after_are_the_same_in_any_order(post: Callable[..., Merger]) -> None:
    """What changes task vectors may stand inside or outside of what changes the merged one."""
    inputs, options = Zoo(tasks=3).inputs(), {"alpha": 0.5} if post is LiNeS else {}
    inside = post(base=DARE(base=TSVM()), **options).merge(inputs)
    outside = DARE(base=post(base=TSVM(), **options)).merge(inputs)
    assert (inside.scale, inside.fixed) == (outside.scale, outside.fixed)
    assert all(outside.update[key].equal(value) for key, value in inside.update.items())


def test_svc_inside_of_dare_knows_the_changed_task_vectors() -> None:
    inputs = Zoo(tasks=3).inputs()
    inside, outside = (merger.merge(inputs).update[KEY] for merger in (SVC(base=DARE()), DARE(base=SVC())))
    assert not torch.allclose(inside, outside)


def test_on_proxy_images_below_all() -> None:
    """The innermost may need images; those outside of it hand them through."""
    zoo = Zoo(tasks=3)
    found = LiNeS(base=SVC(base=DARE(base=ESM()))).merge(zoo.inputs())
    assert found.update.keys() == zoo.base.keys()
    assert found.fixed == ESM().merge(zoo.inputs()).fixed
    with pytest.raises(InputError, match="proxy images"):
        LiNeS(base=SVC(base=DARE(base=ESM()))).merge(replace(zoo.inputs(), run_proxies=None))
