"""FeatCal against the published formulas in float64, with whole runs from the images for every block."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from plain import Counted, Plain, Subject, Weights, added, together
from synthetic import Zoo
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.functional import streams
from mergekit_vision.functional.featcal import NormInputs, PairedInputs
from mergekit_vision.merger import LinearInfo, Merged, MergeInputs, Merger, NormInfo
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.featcal import FeatCal
from mergekit_vision.plugins.regmean import RegMean
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic


@pytest.fixture(params=["made up, T=1", "made up, T=3", "made up, T=9", "tiny"])
def subject(request: pytest.FixtureRequest) -> Subject:
    if request.param == "tiny":
        return Subject(request.getfixturevalue("bench"))
    return Subject(Zoo(tasks=int(request.param[-1]), images=80))


def weighted_mean(x: Tensor, w: Tensor) -> Tensor:
    """Over tokens of ``[images * tokens, ...]``."""
    return torch.einsum("n,n...->...", w, x) / w.sum()


def token_weights(x: Tensor, patches: float) -> Tensor:
    w = torch.full(x.shape[:2], patches, dtype=torch.float64)
    w[:, 0] = 1
    return w.flatten()


def formula(
    plain: Plain,
    linears: tuple[LinearInfo, ...],
    norms: tuple[NormInfo, ...],
    *,
    scale: float = 0.3,
    alpha: float = 0.25,
    rho: float = 2.2,
    ridge: float = 0.05,
    patches: float = 0.01,
) -> Weights:
    """The update of the whole model, calibrated from ``scale`` times the sum of the task vectors."""
    base, last = plain.base, linears[-1].block
    merged = added(base, {key: scale * torch.stack(plain.delta(key)).sum(0) for key in base})
    anchor = {key: rho * value + (1 - rho) * base[key] for key, value in merged.items()}
    for block in range(last + 1):
        layers = [layer for layer in (*linears, *norms) if layer.block == block]
        own = {task: plain.inputs(task, merged, layers) for task in plain.experts}
        experts = {task: plain.inputs(task, expert, layers) for task, expert in plain.experts.items()}
        new = dict(merged)  # all of a block is calibrated at once
        for layer in layers:
            seen = [(own[task][layer.name], experts[task][layer.name], plain.experts[task]) for task in plain.experts]
            weight = patches if block == last else 1.0
            if isinstance(layer, NormInfo):
                new[layer.weight], new[layer.bias] = norm_formula(layer, seen, anchor, ridge, weight)
                continue
            assert layer.bias is not None
            W, b = [], []
            d = len(base[layer.weight]) // 3
            for part in ("q", "k", "v") if layer.kind == "in_proj" else ("",):
                at = slice(None) if not part else slice("qkv".index(part) * d, "qkv".index(part) * d + d)
                found = linear_formula(layer, at, seen, anchor, alpha, ridge, 1.0 if part in ("k", "v") else weight)
                W.append(found[0])
                b.append(found[1])
            new[layer.weight], new[layer.bias] = torch.cat(W), torch.cat(b)
        merged = new
    return {key: value - base[key] for key, value in merged.items()}


Seen = list[tuple[Tensor, Tensor, Weights]]


def linear_formula(
    layer: LinearInfo, at: slice, seen: Seen, anchor: Weights, alpha: float, ridge: float, patches: float
) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    W_A, b_A = anchor[layer.weight][at], anchor[layer.bias][at]
    left, right, parts = ridge * torch.eye(W_A.shape[1], dtype=torch.float64), ridge * W_A.T, []
    for x_s, x_e, expert in seen:
        w, x_s, x_e = token_weights(x_s, patches), x_s.flatten(0, 1), x_e.flatten(0, 1)
        x_t = alpha * x_e + (1 - alpha) * x_s
        C = x_s.T * w @ x_s / w.sum()
        K = x_s.T * w @ x_t / w.sum()
        W_t, b_t = expert[layer.weight][at], expert[layer.bias][at]
        left, right = left + C / C.norm(), right + K / C.norm() @ W_t.T
        parts.append((1 / C.norm(), b_t + W_t @ weighted_mean(x_t, w), weighted_mean(x_s, w)))
    W = torch.linalg.solve(left, right).T
    b = sum(s * (y - W @ m) for s, y, m in parts) + ridge * b_A
    return W, b / (sum(s for s, _, _ in parts) + ridge)


def norm_formula(layer: NormInfo, seen: Seen, anchor: Weights, ridge: float, patches: float) -> tuple[Tensor, Tensor]:
    """In each channel, a 2 x 2 system."""
    held = torch.stack([anchor[layer.weight], anchor[layer.bias]], 1)
    left, right = ridge * torch.eye(2, dtype=torch.float64).expand(len(held), 2, 2), ridge * held
    for x, _, expert in seen:
        w = token_weights(x, patches)
        z = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()).flatten(0, 1)
        A = torch.stack([z, torch.ones_like(z)], 2)  # [tokens, channels, 2]
        M = torch.einsum("n,nci,ncj->cij", w, A, A) / w.sum()
        left = left + M
        right = right + torch.einsum("cij,cj->ci", M, torch.stack([expert[layer.weight], expert[layer.bias]], 1))
    found = torch.linalg.solve(left, right)
    return found[:, 0], found[:, 1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 1.0, "rho": 1.0, "ridge": 1.0},
        {"alpha": 0.0, "rho": 0.5, "ridge": 0.2, "patches": 1.0},
        {"alpha": 0.5, "patches": 0.3},
    ],
)
def test_featcal(subject: Subject, options: dict[str, float]) -> None:
    merged = FeatCal(**options).merge(subject.inputs)
    assert not merged.scalable
    assert merged.scale == 0.3, "which the sum was taken at"
    subject.check(merged.update, partial(formula, linears=subject.linears, norms=subject.norms, **options))


@pytest.mark.parametrize("tokens", [1, 35])
def test_images_may_run_in_parts(subject: Subject, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """One by one, or seven at a time with some left over: nothing but the order of sums in float64 depends on it."""
    monkeypatch.setattr(streams, "STEP", tokens)
    merged = FeatCal().merge(subject.inputs)
    subject.check(merged.update, partial(formula, linears=subject.linears, norms=subject.norms))


def test_normalizations_may_stay(subject: Subject) -> None:
    merged = FeatCal(norms=False).merge(subject.inputs)
    subject.check(merged.update, partial(formula, linears=subject.linears, norms=()))


def test_the_base_is_taken_at_the_coefficient_at_which_it_is_used() -> None:
    zoo, asked = Zoo(tasks=3), []

    def choose(merged: Merged) -> float:
        asked.append(merged)
        return 0.7

    subject = Subject(zoo)
    for base in (None, TaskArithmetic()):
        inputs = replace(zoo.inputs(), choose_scale=choose)
        merged = FeatCal(base=base, rho=1.5).merge(inputs)
        assert merged.scale == 0.7
        subject.check(merged.update, partial(formula, linears=subject.linears, norms=subject.norms, scale=0.7, rho=1.5))
    assert len(asked) == 2


def test_the_anchor_of_another_base_is_that_base() -> None:
    zoo = Zoo(tasks=3)
    for base, rho in ((None, 2.2), (TaskArithmetic(), 1.0)):
        found, expected = (FeatCal(base=base, rho=given).merge(zoo.inputs()).update for given in (None, rho))
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_heavy_anchor_gives_the_base() -> None:
    zoo = Zoo(tasks=3)
    base = TaskArithmetic().merge(zoo.inputs())
    found = FeatCal(base=TaskArithmetic(), ridge=1e9).merge(zoo.inputs()).update
    for key, value in base.update.items():
        assert (found[key] - 0.3 * value).norm() < 1e-6 * value.norm(), key


def test_an_expert_that_is_the_base_already_stays_itself(bench: Workbench) -> None:
    """Nothing is left to calibrate: whatever the hyper-parameters, that is where all of them agree."""
    task = next(iter(bench.evaluator.data.suite.experts))
    inputs = replace(bench.inputs({task: bench.evaluator.data.suite.experts[task]}), choose_scale=lambda _: 1.0)
    for merger in (FeatCal(rho=1.0), FeatCal(rho=1.0, alpha=1.0, ridge=1.0, patches=1.0)):
        for key, value in merger.merge(inputs).update.items():
            delta = inputs.delta(task, key)
            assert (value - delta).norm() < 1e-4 * delta.norm(), key


def test_two_processes_find_what_one_does() -> None:
    inputs = Zoo(tasks=3).inputs()
    alone = FeatCal().merge(inputs).update
    for rotate in (False, True):
        for found in together(inputs, FeatCal(), rotate):
            assert found.update.keys() == alone.keys()
            assert all(torch.equal(found.update[key], value) for key, value in alone.items())


def test_each_block_is_run_three_times_a_task(bench: Workbench) -> None:
    """As merged and in the expert, side by side; and as calibrated, before the next block."""
    inputs = bench.inputs(bench.evaluator.data.suite.experts)
    counted = Counted(inputs.blocks)
    FeatCal().merge(replace(inputs, streams=counted))
    assert (counted.embeddings, counted.blocks) == (2 * 3, 2 * 3 * 2 + 3)


@pytest.mark.parametrize("layer", ["attn.out_proj.weight", "ln_1.weight", "ln_1.bias", "mlp.c_fc.bias"])
def test_what_no_expert_changed_stays(layer: str) -> None:
    zoo = Zoo(tasks=3)
    key = f"visual.transformer.resblocks.1.{layer}"
    for expert in zoo.experts.values():
        expert[key] = zoo.base[key].clone()
    update = FeatCal().merge(zoo.inputs()).update
    assert not update[key].any()
    assert all(value.isfinite().all() for value in update.values())
    other = key.replace("weight", "bias") if "weight" in key else key.replace("bias", "weight")
    assert update[other].any()


class Sparse(Merger):
    """A base that merges one parameter, and leaves the others as they were."""

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({"visual.proj": inputs.deltas("visual.proj").mean(0)})


def test_a_base_may_leave_parameters_out() -> None:
    zoo = Zoo(tasks=3)
    merged = FeatCal(base=Sparse()).merge(zoo.inputs())
    blocks = {layer.weight for layer in (*zoo.inputs().linears, *zoo.inputs().norms)}
    assert blocks < merged.update.keys()
    assert torch.equal(merged.update["visual.proj"], zoo.inputs().deltas("visual.proj").mean(0))
    assert "visual.conv1.weight" not in merged.update


def test_inputs_that_are_zero_leave_the_anchor() -> None:
    pair, norm = PairedInputs(torch.zeros(2, 3), torch.ones(2, 3), 0.5), NormInputs(torch.ones(3))
    x = torch.zeros(4, 5, 3)
    pair.merged(x)
    pair.expert(x)
    norm.merged(x)
    W, b = torch.randn(2, 3), torch.randn(2)
    found = pair.fit(torch.ones(2)).calibrate(W, b, 0.1)
    torch.testing.assert_close(found[0].float(), W)
    assert found[1] is not None
    torch.testing.assert_close(found[1].float(), (torch.ones(2) + 0.1 * b) / 1.1, msg="the output is the experts' bias")
    gain, offset = norm.fit(torch.zeros(3)).calibrate(W[0], torch.zeros(3), 0.0)
    assert offset is not None
    torch.testing.assert_close(gain.float(), W[0])


def test_it_calibrates_a_merge_that_has_no_coefficient() -> None:
    zoo = Zoo(tasks=3)
    found = FeatCal(base=RegMean(), ridge=1.0).merge(zoo.inputs())
    assert not found.scalable
    assert any((found.update[key] - value).any() for key, value in RegMean().merge(zoo.inputs()).update.items())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FeatCal(alpha=1.5), "alpha"),
        (lambda: FeatCal(alpha=float("nan")), "alpha"),
        (lambda: FeatCal(patches=-0.1), "patches"),
        (lambda: FeatCal(rho=-1), "rho"),
        (lambda: FeatCal(ridge=float("inf")), "ridge"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=f": {named} is "):
        make()
