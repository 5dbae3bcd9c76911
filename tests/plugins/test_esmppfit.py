"""ESMPPFit against its formulas in float64, with whole runs from the images for every layer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from plain import Counted, Plain, Subject, Weights, added, together
from synthetic import INFOS, TOKENS, Adapter, Zoo, weight_key
from tolerances import eps
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional import streams
from mergekit_vision.functional.lowrank import low_rank_fit
from mergekit_vision.merger import LinearInfo, LinearKind, Merged, Merger, NormInfo
from mergekit_vision.plugins.esmpp import ESMPPBayes
from mergekit_vision.plugins.esmppfit import ESMPPFit
from mergekit_vision.plugins.featcal import FeatCal
from mergekit_vision.plugins.lines import LiNeS
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.routers import LinearRouter


def solved(x: Tensor, target: Tensor, anchor: Tensor, rank: int, ridge: float) -> Tensor:
    """The best matrix of limited rank: least squares with a row more for each dimension, then what an SVD of outputs keeps."""
    pull = (ridge * x.square().sum() / x.shape[1]).sqrt()
    rows = torch.cat([x, pull * torch.eye(x.shape[1], dtype=torch.float64)])
    free = torch.linalg.lstsq(rows, torch.cat([target, pull * anchor.T]), driver="gelsd").solution.T
    _, _, Vh = torch.linalg.svd(rows @ free.T, full_matrices=False)
    return Vh[:rank].T @ Vh[:rank] @ free


def objective(R: Tensor, x: Tensor, target: Tensor, anchor: Tensor, ridge: float) -> float:
    return float((target - x @ R.T).square().sum() + ridge * x.square().sum() / x.shape[1] * (R - anchor).square().sum())


@pytest.mark.parametrize(("d_out", "d_in"), [(9, 6), (6, 9), (7, 7)])
def test_no_matrix_of_that_rank_fits_better(d_out: int, d_in: int) -> None:
    generator = torch.Generator().manual_seed(d_out)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, target, anchor = random(5, d_in), random(5, d_out), random(d_out, d_in)  # fewer rows than dimensions
    up, down = low_rank_fit(x.T @ x, x.T @ target, anchor, 3, 0.2)
    found = up.double() @ down.double()
    expected = solved(x, target, anchor, 3, 0.2)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    least = objective(expected, x, target, anchor, 0.2)
    for _ in range(20):
        U, V = up.double() + 0.01 * random(up.shape), down.double() + 0.01 * random(down.shape)
        assert objective(U @ V, x, target, anchor, 0.2) > least


def arithmetic(plain: Plain) -> Weights:
    """The base's update: 0.3 times the sum of the task vectors."""
    return {key: 0.3 * torch.stack(plain.delta(key)).sum(0) for key in plain.base}


def formula(
    plain: Plain,
    linears: tuple[LinearInfo, ...],
    norms: tuple[NormInfo, ...],
    rank: int,
    ridge: float,
    patches: float,
    update: Callable[[Plain], Weights] = arithmetic,
    fitted: Callable[[LinearInfo], bool] = lambda linear: True,
) -> Weights:
    """What each expert adds to each weight of the layers that are fitted."""
    merged = added(plain.base, update(plain))
    found, last = {}, linears[-1].block
    for task, own in plain.experts.items():
        weights = dict(merged)
        for linear in filter(fitted, linears):
            (stream,) = (norm for norm in norms if norm.block == linear.block and norm.name.endswith("ln_2"))
            block = [other for other in linears if other.block == linear.block]
            ours, theirs = (plain.inputs(task, w, [*block, stream]) for w in (weights, own))

            def wanted(seen: dict[str, Tensor], w: Weights, linear: LinearInfo = linear, after: str = stream.name) -> Tensor:
                """What the fit is to give: of a layer that adds to the stream, the stream behind it."""
                assert linear.bias is not None
                out = seen[linear.name] @ w[linear.weight].T + w[linear.bias]
                return seen[after] if linear.kind == "out_proj" else seen[after] + out if linear.kind == "c_proj" else out

            x = ours[linear.name]
            w = torch.full((*x.shape[:2], 1), 1.0, dtype=torch.float64)
            w[:, 1:] = patches if linear.block == last and linear.kind != "in_proj" else 1.0
            rows, target = ((w.sqrt() * part).flatten(0, 1) for part in (x, wanted(theirs, own) - wanted(ours, weights)))
            change = solved(rows, target, own[linear.weight] - weights[linear.weight], rank, ridge)
            found[f"{task} {linear.weight}"] = change
            weights[linear.weight] = weights[linear.weight] + change
    return found


def changes(merged: Merged, tasks: tuple[str, ...]) -> Weights:
    """The same, as it was found."""
    return {
        f"{task} {weight_key(name)}": (experts.up[at] @ experts.down[at])
        for at, task in enumerate(tasks)
        for name, experts in merged.routed.items()
    }


@pytest.mark.parametrize(("tasks", "options"), [(1, {}), (3, {}), (3, {"rank": 30}), (2, {"ridge": 3.0, "patches": 0.5})])
def test_experts_follow_the_formula(tasks: int, options: dict[str, float]) -> None:
    subject = Subject(Zoo(tasks=tasks, change=0.03))
    chosen = {"rank": 6, "ridge": 0.1, "patches": 0.1, **options}
    merged = ESMPPFit(base=TaskArithmetic(), **chosen).merge(subject.inputs)  # type: ignore[arg-type]
    found = changes(merged, subject.inputs.tasks)
    subject.check(found, partial(formula, linears=subject.linears, norms=subject.norms, **chosen), most=1e-3)


CHOSEN = {"rank": 6, "ridge": 0.1, "patches": 0.1}


def test_a_layer_that_no_expert_changed_is_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STEP", 32 * TOKENS)
    zoo = Zoo(tasks=2, change=0.03)
    same = {INFOS[at].weight for at in (0, 3, 5, 7)}  # in_proj and c_proj of the first block, out_proj and c_proj of the last
    for expert in zoo.experts.values():
        expert.update({key: zoo.base[key].clone() for key in same})
    subject = Subject(zoo)
    counted = Counted(zoo)
    merged = ESMPPFit(base=TaskArithmetic(), **CHOSEN).merge(replace(subject.inputs, streams=counted))  # type: ignore[arg-type]
    found = changes(merged, subject.inputs.tasks)
    assert len(merged.routed) == len(INFOS)
    assert all(found.pop(f"{task} {key}").count_nonzero() == 0 for task in zoo.experts for key in same)
    subject.check(
        found,
        partial(formula, linears=INFOS, norms=subject.norms, **CHOSEN, fitted=lambda linear: linear.weight not in same),
        most=1e-3,
    )
    # an expert: two models embedded; in a block the expert, each of two layers for 32 and 8 images, and the way to the next
    assert (counted.embeddings, counted.blocks) == (2 * 2, 2 * (1 + 2 * 2 + 1 + 1 + 2 * 2))


@pytest.mark.parametrize("kind", ["in_proj", "out_proj", "c_proj"])
def test_layers_of_one_kind(kind: LinearKind) -> None:
    subject = Subject(Zoo(tasks=2, change=0.03))
    merged = ESMPPFit(base=TaskArithmetic(), layers=(kind,), **CHOSEN).merge(subject.inputs)  # type: ignore[arg-type]
    found = changes(merged, subject.inputs.tasks)
    fitted = partial(formula, linears=INFOS, norms=subject.norms, **CHOSEN, fitted=lambda linear: linear.kind == kind)
    subject.check(found, fitted, most=1e-3)


@pytest.mark.parametrize("base", [FeatCal(base=TaskArithmetic()), LiNeS(base=TaskArithmetic())], ids=["FeatCal", "LiNeS"])
def test_a_base_of_any_scale_and_with_fixed_parameters(base: Merger) -> None:
    subject = Subject(Zoo(tasks=2, change=0.03))
    merged = ESMPPFit(base=base, **CHOSEN).merge(subject.inputs)  # type: ignore[arg-type]
    alone = base.merge(subject.inputs)
    update = {key: value * (1 if key in alone.fixed else alone.scale) for key, value in alone.update.items()}
    assert merged.fixed >= merged.update.keys()
    assert merged.update.keys() == update.keys()
    assert all((merged.update[key] - value).norm() <= 2 * eps() * value.norm() for key, value in update.items())
    given = {key: value.double() for key, value in merged.update.items()}
    fitted = partial(formula, linears=INFOS, norms=subject.norms, **CHOSEN, update=lambda plain: given)
    subject.check(changes(merged, subject.inputs.tasks), fitted, most=1e-3)


def test_adapters_are_fitted_as_whole_experts_are() -> None:
    """As nearly as these are known: by their weights' rounding errors, which adapters do not have."""
    zoo, merger = Zoo(tasks=2), ESMPPFit(base=TaskArithmetic(), rank=6)
    zoo.experts = {f"task{t}": Adapter(zoo.base, t) for t in range(2)}
    found = changes(merger.merge(zoo.inputs()), zoo.inputs().tasks)
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    whole = []
    for noise in (0.0, eps()):
        experts = {t: {k: v + noise * v.abs() * random(v.shape) for k, v in expert.items()} for t, expert in zoo.experts.items()}
        inputs = replace(zoo.inputs(), experts=experts)
        whole.append(changes(merger.merge(inputs), inputs.tasks))
    for key, value in found.items():
        bound = 8 * ((whole[1][key] - whole[0][key]).norm() + eps() * value.norm())
        assert (value - whole[0][key]).norm() < bound < 1e-3 * value.norm(), key


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("merger", [ESMPPFit(rank=2), ESMPPBayes(rank=2)], ids=["ESMPPFit", "ESMPPBayes"])
def test_one_or_two_proxy_images_a_task_will_do(merger: Merger, images: int) -> None:
    merged = merger.merge(Zoo(tasks=3, images=images).inputs())
    for name, experts in merged.routed.items():
        assert 1 <= experts.router.temperature <= 1e4, name
        assert all(tensor.isfinite().all() for tensor in (experts.up, experts.down, *experts.router.buffers())), name


def test_layer_scale_is_refused() -> None:
    zoo = Zoo(tasks=2)
    inputs = zoo.inputs()
    scaled = replace(inputs, base={**zoo.base, "visual.transformer.resblocks.0.ls_1.gamma": torch.ones(24)})
    with pytest.raises(InputError, match=r"LayerScale.*ESMPPBayes"):
        ESMPPFit().merge(scaled)


def test_an_expert_that_differs_in_the_matrices_alone_is_kept_whole_at_full_rank() -> None:
    zoo = Zoo(tasks=3)
    matrices = {linear.weight for linear in INFOS}
    for expert in zoo.experts.values():
        expert.update({key: value.clone() for key, value in zoo.base.items() if key not in matrices})
    inputs = zoo.inputs()
    merged = ESMPPFit(base=TaskArithmetic(), rank=24).merge(inputs)
    for name, found in changes(merged, inputs.tasks).items():
        task, key = name.split()
        residual = inputs.delta(task, key) - merged.update[key]
        assert (found - residual).norm() < 1e-4 * residual.norm(), name


def test_one_narrow_layer_decides_for_all() -> None:
    merged = ESMPPFit(rank=2).merge(Zoo(tasks=3).inputs())
    deciding = [name for name, experts in merged.routed.items() if experts.evidence != "hold"]
    assert deciding == ["visual.transformer.resblocks.1.mlp.c_fc"]
    experts = merged.routed[deciding[0]]
    assert (experts.evidence, type(experts.router), experts.router.top_k) == ("ahead", LinearRouter, 2)


@pytest.mark.parametrize("rotate", [False, True])
def test_processes_that_share_the_work_find_the_same(rotate: bool) -> None:
    inputs = Subject(Zoo(tasks=3)).inputs
    merger = ESMPPFit(base=TaskArithmetic(), rank=2)
    alone = changes(merger.merge(inputs), inputs.tasks)
    for merged in together(inputs, merger, rotate):
        assert all(value.equal(alone[name]) for name, value in changes(merged, inputs.tasks).items())


@pytest.mark.parametrize("options", [{"rank": 0}, {"top_k": 0}, {"ridge": 0.0}, {"ridge": float("nan")}, {"patches": 1.5}])
def test_what_is_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        ESMPPFit(**options)  # type: ignore[arg-type]
