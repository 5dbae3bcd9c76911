"""FisherFit against its normal equations in float64, and gradients against finite differences."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from plain import Subject, together
from synthetic import INFOS, Zoo, relative_error
from torch import Tensor
from torch.nn import functional as F

from mergekit_vision.errors import InputError
from mergekit_vision.functional import fisher
from mergekit_vision.functional.fisher import CurvatureMoments
from mergekit_vision.merger import CompressedExpert, GradientObserver, Merged, Merger, merged_weights
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.fisher import FisherFit
from mergekit_vision.plugins.lines import LiNeS
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic


def normal_equations(zoo: Zoo, position: int, rho: float, ridge: float, floor: float) -> Tensor:
    """The update of one layer's weight: the whole system written out and solved, ``[d_out, d_in]``."""
    linear = INFOS[position]
    deltas = zoo.delta64(linear.weight)
    A = 0.3 * rho * deltas.sum(0)
    d_out, d_in = A.shape
    system, right = ridge * torch.eye(d_out * d_in, dtype=torch.float64), ridge * A.flatten()
    for task, delta in zip(zoo.experts, deltas, strict=True):
        x, g = zoo.rows(task, linear.name), zoo.gradient(task, linear.name).flatten(0, 1).double()
        G, H = x.T @ x / (x.T @ x).norm(), g.T @ g * d_out / g.square().sum()
        H = (1 - floor) * H + floor * torch.eye(d_out, dtype=torch.float64)
        system += torch.kron(H, G)
        right += (H @ delta @ G).flatten()
    return torch.linalg.solve(system, right).view(d_out, d_in)


@pytest.mark.parametrize("options", [{}, {"rho": 0.7, "ridge": 0.2, "floor": 0.0}, {"floor": 1.0, "ridge": 5.0}])
@pytest.mark.parametrize("tasks", [1, 3])
def test_the_normal_equations_are_solved(tasks: int, options: dict[str, float]) -> None:
    """The right-hand side is float32, so that errors of its precision pass through a system of condition below 1e3."""
    zoo, options = Zoo(tasks=tasks), {"rho": 1.4, "ridge": 1.0, "floor": 0.1} | options
    found = FisherFit(base=TaskArithmetic(), **options).merge(zoo.inputs())  # type: ignore[arg-type]
    assert found.fixed == found.update.keys()
    for position in (0, 1, 5):
        expected = normal_equations(zoo, position, **options)
        assert relative_error(found.update[INFOS[position].weight], expected) < 1e-5


def test_layers_in_parts_are_fitted_like_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, runs = Zoo(tasks=2).inputs(), list[int]()
    whole = FisherFit(base=TaskArithmetic()).merge(inputs)
    run = inputs.run_backward
    assert run is not None

    def counted(task: str, observers: Mapping[str, GradientObserver], model: Merged) -> None:
        runs.append(len(observers))
        run(task, observers, model)

    monkeypatch.setattr(fisher, "HELD", 1)
    parts = FisherFit(base=TaskArithmetic()).merge(replace(inputs, run_backward=counted))
    assert runs == [1] * 2 * len(INFOS)
    assert all(parts.update[key].equal(value) for key, value in whole.update.items())


def test_what_is_no_layer_of_a_block_is_as_in_the_base() -> None:
    inputs = replace(Zoo(tasks=3).inputs(), choose_scale=lambda _: 0.5)
    base, found = TaskArithmetic().merge(inputs), FisherFit(base=TaskArithmetic()).merge(inputs)
    fits = {linear.weight for linear in INFOS}
    assert found.scale == 0.5
    assert found.update.keys() == base.update.keys()
    for key, value in base.update.items():
        assert found.update[key].equal(0.5 * value) != (key in fits)


def test_the_base_is_esm_by_default() -> None:
    inputs = Zoo(tasks=3).inputs()
    default, named = FisherFit().merge(inputs), FisherFit(base=ESM()).merge(inputs)
    assert all(value.equal(named.update[key]) for key, value in default.update.items())


def test_a_heavy_anchor_gives_the_base() -> None:
    inputs = Zoo(tasks=3).inputs()
    base, found = TaskArithmetic().merge(inputs), FisherFit(base=TaskArithmetic(), rho=1.0, ridge=1e9).merge(inputs)
    for key, value in base.update.items():
        assert relative_error(found.update[key], 0.3 * value) < 1e-6


def test_gradients_are_those_of_the_divergence(bench: Workbench) -> None:
    """A small change of a layer's bias changes the divergence by what the gradients by its outputs add up to."""
    experts = bench.evaluator.data.suite.experts
    task = next(iter(experts))
    update = {key: 0.3 * (experts[task][key].float() - value) for key, value in bench.base.items()}
    linear = bench.evaluator.encoder.linears[-2]
    assert linear.bias is not None
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        bench.inputs(experts).differentiate(task, {linear.name: lambda x, g: seen.append((x, g))}, Merged(update))
    gradient = torch.cat([g for _, g in seen]).double().sum((0, 1))
    assert all(x.shape[:2] == g.shape[:2] and not (x.requires_grad or g.requires_grad) for x, g in seen)

    def divergence(step: float) -> float:
        weights = merged_weights(bench.base, Merged(update))
        weights[linear.bias or ""] = weights[linear.bias or ""] + step * gradient.float() / gradient.norm().float()
        with torch.no_grad():
            opinions = []
            for own in (experts[task], weights):
                with bench.evaluator.with_weights(own) as running:
                    embeddings = torch.cat([running.encoder(images) for images in running.data.proxy_loader(task)])
                    head = running.heads().weight(task)
                    opinions.append((F.normalize(embeddings.double(), dim=-1) @ head.double().T).log_softmax(-1))
        return float((opinions[0].exp() * (opinions[0] - opinions[1])).sum())

    step = 1e-2  # rounding of float32 over twice the step, and the third derivative times its square, are both far below 1 %
    slope = (divergence(step) - divergence(-step)) / (2 * step)
    assert slope == pytest.approx(float(gradient.norm()), rel=0.02)
    assert all(parameter.grad is None for parameter in bench.evaluator.encoder.parameters())


def test_layers_that_no_expert_changed_stay_and_a_few_changed_are_fitted() -> None:
    zoo = Zoo(tasks=2)
    still, moved = INFOS[1].weight, INFOS[2].weight
    for expert in zoo.experts.values():
        expert[still] = zoo.base[still].clone()
    zoo.experts["task0"][moved] = zoo.base[moved].clone()
    found = FisherFit(base=TaskArithmetic()).merge(zoo.inputs()).update
    assert still not in found or not found[still].any()
    assert relative_error(found[moved], normal_equations(zoo, 2, 1.4, 1.0, 0.1)) < 1e-5


def test_a_model_that_says_what_the_expert_does_has_no_curvature_but_the_floor() -> None:
    x, rounding = torch.randn(4, 5, 6), 1e-9 * torch.randn(4, 5, 3)
    for gradient in (torch.zeros(4, 5, 3), rounding):
        moments = CurvatureMoments()
        moments(x, gradient)
        _, H = moments.curvature(0.25).matrices((3, 6))
        assert H.equal(0.25 * torch.eye(3, dtype=torch.float64))


def test_on_changed_task_vectors_and_with_others_before_it() -> None:
    inputs = Zoo(tasks=2).inputs()
    whole, half = (FisherFit(base=base, rho=1.0).merge(inputs) for base in (TaskArithmetic(), LiNeS(base=TaskArithmetic())))
    assert whole.update.keys() == half.update.keys()
    shrunk = inputs.view(lambda task, key, delta: 0.5 * delta)
    found = FisherFit(base=TaskArithmetic(), rho=1.0).merge(shrunk).update
    assert all(relative_error(value, 0.5 * whole.update[key]) < 1e-5 for key, value in found.items()), "linear in task vectors"


def test_processes_that_share_the_work_find_the_same() -> None:
    inputs = Subject(Zoo(tasks=3)).inputs
    alone = FisherFit(base=TaskArithmetic()).merge(inputs).update
    for merged in together(inputs, FisherFit(base=TaskArithmetic()), False):
        assert all(value.equal(alone[key]) for key, value in merged.update.items())


def test_nothing_is_left_behind_where_an_observer_fails(bench: Workbench) -> None:
    experts, linear = bench.evaluator.data.suite.experts, bench.evaluator.encoder.linears[0]
    inputs, task = bench.inputs(experts), next(iter(experts))
    before = {key: value.clone() for key, value in bench.evaluator.encoder.state_dict().items()}
    inputs.differentiate(task, {}, Merged({}))

    def fail(x: Tensor, gradient: Tensor) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        inputs.differentiate(task, {linear.name: fail}, Merged({}))
    encoder = bench.evaluator.encoder
    assert all(value.equal(before[key]) for key, value in encoder.state_dict().items())
    assert not any(module._forward_hooks for module in encoder.modules())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    with pytest.raises(InputError, match="routed or compressed experts"):
        inputs.differentiate(task, {linear.name: fail}, Merged({}, experts={task: CompressedExpert(0, dict)}))


def test_gradients_need_images_and_known_layers() -> None:
    inputs = Zoo(tasks=2).inputs()
    with pytest.raises(InputError, match="needs proxy images"):
        FisherFit(base=TaskArithmetic()).merge(replace(inputs, run_backward=None))
    with pytest.raises(InputError, match="not a Linear layer of this encoder"):
        inputs.differentiate("task0", {"visual.nothing": CurvatureMoments()}, Merged({}))
    with pytest.raises(ValueError, match="no inputs were observed"):
        CurvatureMoments().curvature(0.1)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FisherFit(rho=-1), "rho is -1"),
        (lambda: FisherFit(ridge=0), "ridge is 0"),
        (lambda: FisherFit(ridge=float("inf")), "ridge is inf"),
        (lambda: FisherFit(floor=1.5), "floor is 1.5"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=f"FisherFit: {named}"):
        make()
