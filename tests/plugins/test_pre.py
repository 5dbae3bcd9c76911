"""Methods that change task vectors before another one merges them, against their formulas, and what chance does in them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import formulas
import pytest
import torch
from synthetic import LINEARS, Zoo, relative_error, weight_key
from tolerances import eps, of_formula, summed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, MergeInputs, Merger
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.dare import DARE, DELLA
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.star import STAR, EnergyRank
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.trim import Breadcrumbs, Trim
from mergekit_vision.plugins.tsvm import TSVM

PRE: list[Callable[..., Merger]] = [DARE, DELLA, Breadcrumbs, STAR, Trim, EnergyRank]
RANDOM: list[Callable[..., Merger]] = [DARE, DELLA]
MATRIX = weight_key(LINEARS[2])
BLOCKS = {weight_key(linear) for linear in LINEARS}

Deltas = dict[tuple[str, str], Tensor]

every_pre = pytest.mark.parametrize("pre", PRE)
every_random = pytest.mark.parametrize("pre", RANDOM)


@dataclass(frozen=True)
class Seen(Merger):
    """Keeps the task vectors that it gets."""

    found: Deltas = field(default_factory=dict)

    def merge(self, inputs: MergeInputs) -> Merged:
        self.found.update({(task, key): inputs.delta(task, key) for key in inputs.base for task in inputs.tasks})
        return Merged({})


def changed(pre: Callable[..., Merger], inputs: MergeInputs, **options: Any) -> Deltas:
    """The task vectors that a method hands on."""
    seen = Seen()
    pre(base=seen, **options).merge(inputs)
    return seen.found


def one(values: Tensor, key: str = "w") -> MergeInputs:
    """A model of one parameter, that an expert changed by ``values``."""
    return MergeInputs({key: torch.zeros_like(values)}, {"a": {key: values}})


# --- all of them


@every_pre
def test_without_a_base_it_is_the_sum_of_what_is_left(pre: Callable[..., Merger]) -> None:
    zoo = Zoo(tasks=3)
    merged, left = pre().merge(zoo.inputs()), changed(pre, zoo.inputs())
    assert (merged.scale, merged.fixed) == (0.3, frozenset())
    for key in zoo.base:
        assert merged.update[key].equal(torch.stack([left[task, key] for task in zoo.experts]).sum(0))


@every_pre
def test_the_base_merges_what_is_left(pre: Callable[..., Merger]) -> None:
    """As if the experts had been such: what the base keeps of its own stays."""
    zoo = Zoo(tasks=3)
    left, other = changed(pre, zoo.inputs()), Zoo(tasks=3)
    other.base = {key: torch.zeros_like(value) for key, value in zoo.base.items()}
    other.experts = {task: {key: left[task, key] for key in zoo.base} for task in zoo.experts}
    for base in (Average(), TIES(density=0.4), TSVM(scale_average=False)):
        found, expected = pre(base=base).merge(zoo.inputs()), base.merge(other.inputs())
        assert (found.scale, found.fixed, found.update.keys()) == (expected.scale, expected.fixed, expected.update.keys())
        assert all(found.update[key].equal(value) for key, value in expected.update.items())


@every_pre
def test_one_task(pre: Callable[..., Merger]) -> None:
    zoo = Zoo(tasks=1)
    update, left = pre(base=Average()).merge(zoo.inputs()).update, changed(pre, zoo.inputs())
    assert all(update[key].equal(left["task0", key]) for key in zoo.base)
    assert any(value.any() for value in update.values())


@every_pre
def test_experts_and_their_proxies_stay_as_they_are(pre: Callable[..., Merger]) -> None:
    zoo, copy = Zoo(tasks=2), Zoo(tasks=2)
    changed(pre, zoo.inputs())
    for task, expert in zoo.experts.items():
        assert all(value.equal(copy.experts[task][key]) for key, value in expert.items())


@every_pre
def test_a_base_with_routed_experts_is_refused(pre: Callable[..., Merger]) -> None:
    with pytest.raises(InputError, match="ESMPP has routed experts"):
        pre(base=ESMPP(base=Average(), rank=2)).merge(Zoo(tasks=2).inputs())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DARE(drop=1.0), "DARE: drop is 1.0"),
        (lambda: DARE(drop=-0.1), "DARE: drop is -0.1"),
        (lambda: DARE(drop=float("nan")), "DARE: drop is nan"),
        (lambda: DELLA(density=0.1), "DELLA: density is 0.1 and epsilon 0.15"),
        (lambda: DELLA(density=0.9), "DELLA: density is 0.9 and epsilon 0.15"),
        (lambda: DELLA(epsilon=-0.1), "DELLA: density is 0.5 and epsilon -0.1"),
        (lambda: DELLA(rescale="l2"), "DELLA: rescale is 'l2'"),
        (lambda: Breadcrumbs(density=0), "Breadcrumbs: density is 0 "),
        (lambda: Breadcrumbs(density=0.9, gamma=0.2), "Breadcrumbs: density is 0.9 and gamma 0.2"),
        (lambda: Breadcrumbs(gamma=-0.01), "Breadcrumbs: density is 0.9 and gamma -0.01"),
        (lambda: Trim(density=0), "Trim: density is 0"),
        (lambda: Trim(density=20), "Trim: density is 20"),
        (lambda: STAR(eta=0), "STAR: eta is 0"),
        (lambda: STAR(eta=40), "STAR: eta is 40"),
        (lambda: STAR(other="mean"), "STAR: other is 'mean'"),
        (lambda: EnergyRank(energy=1.5), "EnergyRank: energy is 1.5"),
        (lambda: EnergyRank(energy=0), "EnergyRank: energy is 0"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make()


# --- chance


def uniform(method: str, seed: int, task: str, key: str, shape: torch.Size) -> Tensor:
    """The random numbers as documented: of nothing but the seed and names."""
    digest = hashlib.sha256(f"{method}\0{seed}\0{task}\0{key}".encode()).digest()
    return torch.rand(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA's, entry by entry in its row."""
    rows = delta.reshape(len(delta), -1) if delta.dim() > 1 else delta[None]
    stay = torch.empty(rows.shape, dtype=torch.float64)
    for i, row in enumerate(rows.abs().tolist()):
        for rank, j in enumerate(sorted(range(len(row)), key=row.__getitem__)):
            stay[i, j] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return stay.view(delta.shape)


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare(drop: float, rescale: bool) -> None:
    zoo = Zoo(tasks=2)
    for (task, key), found in changed(DARE, zoo.inputs(), drop=drop, rescale=rescale, seed=3).items():
        delta = zoo.experts[task][key] - zoo.base[key]
        expected = delta.double() * (uniform("DARE", 3, task, key, delta.shape) >= drop) / (1 - drop if rescale else 1)
        assert ((found - expected).abs() <= eps() * expected.abs()).all()


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.85, 0.15), (0.3, 0.0)])
def test_della(density: float, epsilon: float) -> None:
    zoo = Zoo(tasks=2)
    for (task, key), found in changed(DELLA, zoo.inputs(), density=density, epsilon=epsilon, seed=3).items():
        delta = zoo.experts[task][key] - zoo.base[key]
        stay = probabilities(delta, density, epsilon)
        expected = delta.double() / stay * (uniform("DELLA", 3, task, key, delta.shape) < stay)
        assert ((found - expected).abs() <= 8 * eps() * expected.abs()).all(), "a probability rounds, and a division by it"


def test_della_by_norm() -> None:
    zoo = Zoo(tasks=2)
    by_probability, by_norm = (changed(DELLA, zoo.inputs(), rescale=how) for how in ("probability", "norm"))
    for (task, key), found in by_norm.items():
        delta = (zoo.experts[task][key] - zoo.base[key]).double()
        assert (found != 0).equal(by_probability[task, key] != 0)
        kept = delta * (found != 0)
        assert relative_error(found, kept * delta.abs().sum() / kept.abs().sum()) <= summed(delta.numel())


def test_della_with_single_entries() -> None:
    """A row of one has no ranks: it stays with the mean probability, in the middle, where other codes divide zero by zero."""
    values = torch.ones(4000, 1)
    found = changed(DELLA, one(values), density=0.4)["a", "w"]
    assert found.unique().tolist() == [0.0, 2.5]
    assert abs(float((found != 0).double().mean()) - 0.4) < 5 * (0.24 / 4000) ** 0.5
    assert changed(DELLA, one(torch.tensor(3.0)), density=0.85)["a", "w"].shape == ()


@every_random
def test_the_expected_task_vector_is_the_original(pre: Callable[..., Merger]) -> None:
    """Over many seeds the mean lies within its standard error of the original: on average a squared distance of one such."""
    zoo, seeds = Zoo(tasks=1), 400
    key, delta = MATRIX, (Zoo(tasks=1).experts["task0"][MATRIX] - Zoo(tasks=1).base[MATRIX]).double()
    inputs = MergeInputs({key: zoo.base[key]}, {"task0": {key: zoo.experts["task0"][key]}})
    draws = torch.stack([changed(pre, inputs, seed=seed)["task0", key] for seed in range(seeds)]).double()
    stay = torch.full_like(delta, 0.5) if pre is DARE else probabilities(delta, 0.5, 0.15)
    n = delta.numel()
    share = (draws != 0).double().mean(0)
    distance = (draws.mean(0) - delta) / (delta.abs() * ((1 - stay) / stay / seeds).sqrt())
    assert abs(float(distance.mean())) < 5 / n**0.5
    assert abs(float(distance.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    distance = (share - stay) / (stay * (1 - stay) / seeds).sqrt()
    assert abs(float(distance.square().mean()) - 1) < 5 * (2 / n) ** 0.5, "the probabilities to stay"


@every_random
def test_tasks_parameters_seeds_and_methods_drop_independently(pre: Callable[..., Merger]) -> None:
    values = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros_like(values)
    inputs = MergeInputs(dict.fromkeys("vw", zero), dict.fromkeys("ab", dict.fromkeys("vw", values)))
    other = DELLA if pre is DARE else DARE
    drawn = [*changed(pre, inputs, seed=0).values(), *changed(pre, inputs, seed=1).values(), *changed(other, inputs).values()]
    stays = torch.stack([(draw != 0).double().flatten() for draw in drawn])
    if pre is DELLA or other is DELLA:  # equal magnitudes have equal probabilities, which make for correlation
        stay = torch.stack([torch.full((10000,), 0.5), probabilities(values, 0.5, 0.15).flatten()]).double()
        stays = stays - torch.stack([stay[int(method is DELLA)] for method in [pre] * 8 + [other] * 4])
    correlation = torch.corrcoef(stays) - torch.eye(len(stays))
    assert float(correlation.abs().max()) < 5 / 10000**0.5


@every_random
def test_a_seed_says_it_all_and_neither_order_nor_company_matters(pre: Callable[..., Merger]) -> None:
    zoo = Zoo(tasks=3)
    first = changed(pre, zoo.inputs(), seed=7)
    torch.manual_seed(1)
    torch.rand(5)
    again = changed(pre, zoo.inputs([2, 0, 1]), seed=7)
    single = replace(zoo.inputs(), experts={"task1": zoo.experts["task1"]})
    assert all(again[name].equal(value) for name, value in first.items())
    assert all(value.equal(first[name]) for name, value in changed(pre, single, seed=7).items())
    assert any(not value.equal(first[name]) for name, value in changed(pre, zoo.inputs(), seed=8).items())


@every_random
def test_processes_that_share_the_work_find_the_same(pre: Callable[..., Merger]) -> None:
    """Each computes some of the items, in an order of its own, and none of the others."""
    zoo = Zoo(tasks=3)

    def two_processes(function: Callable[[str], Any], items: Mapping[str, int], description: str) -> dict[str, Any]:
        done = {item: function(item) for part in (list(items)[1::2], list(items)[::2][::-1]) for item in part}
        return {item: done[item] for item in items}

    for base in (None, TIES(density=0.5)):
        alone = pre(base=base).merge(zoo.inputs())
        shared = pre(base=base).merge(replace(zoo.inputs(), share=two_processes))
        assert all(shared.update[key].equal(value) for key, value in alone.update.items())


# --- magnitude


def masked(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Breadcrumbs by sorting all entries."""
    n, values = delta.numel(), delta.flatten()
    order = values.abs().argsort()
    top, kept = int(gamma * n), max(1, int(density * n))
    left = torch.zeros_like(values)
    chosen = order[n - top - kept : n - top]
    left[chosen] = values[chosen]
    return left.view(delta.shape)


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.1, 0.05), (0.5, 0.5), (1.0, 0.0), (0.3, 0.0), (0.01, 0.99)])
def test_breadcrumbs(density: float, gamma: float) -> None:
    zoo = Zoo(tasks=2)
    for (task, key), found in changed(Breadcrumbs, zoo.inputs(), density=density, gamma=gamma).items():
        assert found.equal(masked(zoo.experts[task][key] - zoo.base[key], density, gamma)), key


def test_breadcrumbs_without_outliers_keeps_the_largest() -> None:
    """As it must where ``gamma`` is 0, or so small that a short tensor has no entry to drop."""
    values = torch.tensor([1.0, -4.0, 3.0, 0.5, 2.0])
    for gamma in (0.0, 0.01):
        assert changed(Breadcrumbs, one(values), density=0.6, gamma=gamma)["a", "w"].tolist() == [0.0, -4.0, 3.0, 0.0, 2.0]
    assert changed(Breadcrumbs, one(values), density=0.6, gamma=0.2)["a", "w"].tolist() == [1.0, 0.0, 3.0, 0.0, 2.0]


def test_breadcrumbs_treats_equal_entries_alike() -> None:
    values = torch.tensor([1.0, -1.0, 1.0, 3.0, 3.0, 2.0, 2.0, 2.0, 9.0, 0.0])
    found = changed(Breadcrumbs, one(values), density=0.5, gamma=0.1)["a", "w"]
    assert found.tolist() == [0.0, 0.0, 0.0, 3.0, 3.0, 2.0, 2.0, 2.0, 0.0, 0.0]
    found = changed(Breadcrumbs, one(values), density=0.6, gamma=0.2)["a", "w"]
    assert found.tolist() == [1.0, -1.0, 1.0, 3.0, 3.0, 2.0, 2.0, 2.0, 0.0, 0.0]
    assert changed(Breadcrumbs, one(torch.tensor([5.0])))["a", "w"].tolist() == [5.0], "there is nothing else"


def test_breadcrumbs_sorts_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where finding one rank occupies a single multiprocessor."""
    monkeypatch.setattr(Tensor, "kthvalue", lambda *_: pytest.fail("is slow"))
    with FakeTensorMode():  # knows shapes and devices, also of a device that is not there
        delta = torch.zeros(30, 20, device="cuda")
        assert Breadcrumbs()._masked("a", "w", delta) is delta


@pytest.mark.parametrize("percent", [20, 50, 100])
def test_trim(percent: int) -> None:
    zoo = Zoo(tasks=3)
    left = changed(Trim, zoo.inputs(), density=percent / 100)
    for task, expert in zoo.experts.items():
        whole = torch.cat([(expert[key] - zoo.base[key]).flatten() for key in zoo.base])
        found = torch.cat([left[task, key].flatten() for key in zoo.base])
        kept = min(len(whole), len(whole) * percent // 100 + 1)
        assert found.equal(whole * (whole.abs() >= whole.abs().sort(descending=True).values[kept - 1]))
        assert kept <= int((found != 0).sum()) < kept + 5, "and hardly any that is as large as the last"


@pytest.mark.parametrize("aggregate", ["mean", "sum", "max"])
def test_trim_is_the_first_step_of_ties(aggregate: str) -> None:
    inputs = Zoo(tasks=4).inputs()
    found = Trim(base=TIES(density=1.0, aggregate=aggregate), density=0.3).merge(inputs).update
    expected = TIES(density=0.3, aggregate=aggregate).merge(inputs).update
    assert all(found[key].equal(value) for key, value in expected.items())


def test_trim_names_what_is_not_finite() -> None:
    zoo = Zoo(tasks=2)
    zoo.experts["task1"][MATRIX][0, 0] = float("nan")
    with pytest.raises(InputError, match=f"task1 holds NaN or infinity in {MATRIX}"):
        Trim().merge(zoo.inputs())
    zoo = Zoo(tasks=2)
    zoo.base[MATRIX][0, 0] = float("inf")
    with pytest.raises(InputError, match=r"Trim: .*backbone's weights"):
        Trim().merge(zoo.inputs())


# --- rank


def rank(values: Tensor, share: float) -> int:
    """The fewest of the leading values that make up a share of their sum."""
    return next(k for k in range(1, len(values) + 1) if k == len(values) or values[:k].sum() >= share * values.sum())


def star(delta: Tensor, eta: float) -> Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    k = rank(S, eta)
    return U[:, :k] @ torch.diag(S[:k] * S.sum() / S[:k].sum()) @ Vh[:k]


def energetic(delta: Tensor, energy: float) -> Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    k = rank(S**2, energy)
    return U[:, :k] @ torch.diag(S[:k]) @ Vh[:k]


@pytest.mark.parametrize("eta", [0.05, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("other", ["same", "keep"])
def test_star(eta: float, other: str) -> None:
    zoo = Zoo(tasks=2)
    for (task, key), found in changed(STAR, zoo.inputs(), eta=eta, other=other).items():
        delta = zoo.experts[task][key] - zoo.base[key]
        if delta.dim() == 2 and (key in BLOCKS or other == "same"):
            bound = of_formula(lambda d: star(d, eta), delta.double())
            assert relative_error(found, star(delta.double(), eta)) < min(1e-5, bound), key
            norms = [torch.linalg.matrix_norm(x.double(), "nuc") for x in (found, delta)]
            assert abs(norms[0] - norms[1]) < 1e-5 * norms[1], "the sum of the singular values stays"
        else:
            assert found.equal(delta)


@pytest.mark.parametrize("energy", [0.1, 0.95, 1.0])
def test_energy_rank(energy: float) -> None:
    zoo = Zoo(tasks=2)
    for (task, key), found in changed(EnergyRank, zoo.inputs(), energy=energy).items():
        delta = zoo.experts[task][key] - zoo.base[key]
        if key in BLOCKS:
            bound = of_formula(lambda d: energetic(d, energy), delta.double())
            assert relative_error(found, energetic(delta.double(), energy)) < min(1e-5, bound), key
        else:
            assert found.equal(delta)


def test_ranks_differ_where_spectra_do() -> None:
    flat, steep = torch.diag(torch.full((10,), 2.0)), torch.diag(torch.logspace(0, -9, 10))
    zoo = Zoo(tasks=1)
    left = [
        changed(EnergyRank, replace(one(values, MATRIX), linears=zoo.inputs().linears), energy=0.85)["a", MATRIX]
        for values in (flat, steep)
    ]
    assert [int(torch.linalg.matrix_rank(values)) for values in left] == [9, 1]


@pytest.mark.parametrize("pre", [STAR, EnergyRank])
def test_matrices_of_zeros_have_no_rank(pre: Callable[..., Merger]) -> None:
    zoo = Zoo(tasks=2, change=0.0)
    assert all(not value.any() for value in changed(pre, zoo.inputs()).values())


# --- several


def ranked(zoo: Zoo) -> Iterable[Tensor]:
    """Whole task vectors, ``[P]``, float64, whose matrices are truncated by STAR."""
    for expert in zoo.experts.values():
        deltas = [(expert[key] - zoo.base[key]).double() for key in zoo.base]
        yield torch.cat([(star(delta, 0.6) if delta.dim() == 2 else delta).flatten() for delta in deltas])


def test_three_in_a_row() -> None:
    """The outermost comes first: truncate, then trim, then elect and merge."""
    zoo = Zoo(tasks=4)
    update = STAR(eta=0.6, base=Trim(density=0.5, base=TIES(density=1.0))).merge(zoo.inputs()).update
    found = torch.cat([update[key].flatten() for key in zoo.base])
    expected = formulas.ties(torch.stack(list(ranked(zoo))), 50, "mean")
    assert relative_error(found, expected) < 1e-5
    assert (found != 0).equal(expected != 0)


def test_the_order_of_two_matters() -> None:
    inputs = Zoo(tasks=2).inputs()
    first = Trim(base=STAR(base=Average())).merge(inputs).update[MATRIX]
    second = STAR(base=Trim(base=Average())).merge(inputs).update[MATRIX]
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("base", "times"),
    [(TSVM(), 1), (TIES(), 3), (Trim(base=TSVM()), 3)],  # once to merge, and twice to find a threshold: a sample, and a search
    ids=str,
)
def test_what_a_base_asks_for_is_decomposed_no_oftener_than_it_is_used(
    base: Merger, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo, seen = Zoo(tasks=3), list[Tensor]()
    decompose = STAR._truncated

    def counted(self: STAR, delta: Tensor) -> Tensor:
        seen.append(delta)
        return decompose(self, delta)

    monkeypatch.setattr(STAR, "_truncated", counted)
    STAR(base=base).merge(zoo.inputs())
    assert len(seen) == times * 3 * sum(value.dim() == 2 for value in zoo.base.values())


@pytest.mark.parametrize("pre", [STAR, Trim])
def test_parts_of_what_did_not_change_are_none_in_views_too(pre: Callable[..., Merger]) -> None:
    zoo = Zoo(tasks=2)
    for key in (MATRIX, "visual.proj"):
        for expert in zoo.experts.values():
            expert[key] = zoo.base[key].clone()
    update = pre(base=TSVM()).merge(zoo.inputs()).update
    assert zoo.base.keys() - update.keys() == {MATRIX, "visual.proj"}


def test_chance_in_chance() -> None:
    """With another seed the inner one drops of what the outer one left; both divide."""
    zoo = Zoo(tasks=1)
    seen = Seen()
    DARE(seed=1, base=DARE(seed=2, base=seen)).merge(zoo.inputs())
    outer, inner = (changed(DARE, zoo.inputs(), seed=seed) for seed in (1, 2))
    for (task, key), found in seen.found.items():
        stays = (outer[task, key] != 0) & (inner[task, key] != 0)
        assert found.equal(4 * (zoo.experts[task][key] - zoo.base[key]) * stays), "powers of two do not round"
