"""The contract's data: what mergers may ask for, and what a merged model is."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from synthetic import INFOS, LINEARS, Zoo
from tolerances import eps
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.merger import IN_CACHE, Merged, MergeInputs, Merger, _add_up, linears_of_kind, merged_weights, static_base
from mergekit_vision.routers import HeldRouter, LowRankExperts
from mergekit_vision.support.team import assign_by_cost


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return Zoo(tasks=3)


def test_merged_weights_scale_all_but_the_fixed_keys() -> None:
    base = {"visual.a": torch.tensor([1.0]), "visual.b": torch.tensor([1.0]), "visual.c": torch.tensor([1.0])}
    merged = Merged({"visual.a": torch.tensor([2.0]), "visual.b": torch.tensor([2.0])}, scale=0.5, fixed=frozenset({"visual.b"}))
    assert {key: value.item() for key, value in merged_weights(base, merged).items()} == {
        "visual.a": 2.0,
        "visual.b": 3.0,
        "visual.c": 1.0,
    }
    assert merged_weights(base, merged, 3.0)["visual.a"].item() == 7.0
    assert base["visual.a"].item() == 1.0
    assert merged.update["visual.a"].item() == 2.0
    assert merged_weights(base, merged, 3.0, release=True)["visual.a"].item() == 7.0
    assert not merged.update, "its memory is free"


def test_fixed_keys_must_be_updated() -> None:
    with pytest.raises(ValueError, match=r"does not have: \['visual.b'\]"):
        Merged({"visual.a": torch.zeros(1)}, fixed=frozenset({"visual.b"}))


def test_what_is_fixed_cannot_be_scaled() -> None:
    update = {"a": torch.zeros(1), "b": torch.zeros(1)}
    assert Merged(update).scalable
    assert Merged(update, fixed=frozenset("a")).scalable
    assert not Merged(update, fixed=frozenset("ab")).scalable
    assert not Merged({}).scalable


def test_task_vectors_are_float32_and_in_the_order_of_the_tasks(zoo: Zoo) -> None:
    inputs, key = zoo.inputs([2, 0]), "visual.proj"
    half = replace(inputs, experts={task: {key: weights[key].bfloat16()} for task, weights in inputs.experts.items()})
    assert inputs.tasks == ("task2", "task0")
    assert torch.equal(inputs.deltas(key), torch.stack([inputs.delta(task, key) for task in inputs.tasks]))
    assert torch.equal(inputs.delta("task0", key), zoo.experts["task0"][key] - zoo.base[key])
    assert half.deltas(key).dtype == half.delta("task0", key).dtype == torch.float32
    assert torch.equal(half.delta("task0", key), zoo.experts["task0"][key].bfloat16().float() - zoo.base[key])


def test_whether_an_expert_changed_a_parameter(zoo: Zoo) -> None:
    frozen = {**zoo.experts, "task1": {**zoo.experts["task1"], "visual.proj": zoo.base["visual.proj"].clone()}}
    inputs = replace(zoo.inputs(), experts=frozen)
    assert [inputs.changed(task, "visual.proj") for task in inputs.tasks] == [True, False, True]
    assert inputs.any_changed("visual.proj")
    assert not replace(inputs, experts={"task1": frozen["task1"]}).any_changed("visual.proj")


class Adapter(dict[str, Tensor]):
    """An expert whose change of a matrix is known as a product."""

    def factors(self, key: str) -> tuple[Tensor, Tensor] | None:
        return (torch.ones(len(self[key]), 1), 0.5 * torch.ones(1, self[key].shape[1])) if self[key].dim() == 2 else None


@pytest.mark.parametrize("shape", [(), (7,), (300, 500)])  # more numbers than are added up at once, and fewer
def test_the_total_is_the_sum_of_the_task_vectors(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, a, b, c = (torch.randn(shape, generator=generator) for _ in range(4))
    experts = {"a": {"w": a}, "b": {"w": b.bfloat16()}, "c": Adapter(w=c)}
    inputs = MergeInputs({"w": base}, experts)
    terms = [a.double() - base.double(), b.bfloat16().double() - base.double()]
    terms.append(torch.full(shape, 0.5, dtype=torch.float64) if len(shape) == 2 else c.double() - base.double())
    largest = max(float(term.abs().max()) for term in (*terms, base))
    assert inputs.total("w").dtype == torch.float64
    assert (inputs.total("w") - sum(terms)).abs().max() <= 6 * eps(torch.float64) * 6 * largest, "six additions"
    view = inputs.view(lambda task, key, delta: delta.neg_())
    assert (view.total("w") + sum(terms)).abs().max() <= 3 * eps() * largest, "each task vector is rounded"
    wrong = inputs.view(lambda task, key, delta: delta.new_ones(3, 3))
    with pytest.raises(RuntimeError):
        wrong.total("w")
    same = replace(inputs, experts={task: {"w": base} for task in "abc"})
    assert not same.total("w").any(), "what no expert changed is zero, not round-off"


@pytest.mark.parametrize(("device", "pieces"), [("cpu", 3), ("meta", 1)])
def test_only_on_a_cpu_a_sum_is_made_piece_by_piece(device: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each piece would have to be started."""
    total, terms = torch.zeros(2 * IN_CACHE + 1, device=device).double(), [torch.zeros(2 * IN_CACHE + 1, device=device)] * 2
    sizes, add = list[int](), Tensor.add_
    monkeypatch.setattr(Tensor, "add_", lambda to, *args, **options: sizes.append(len(to)) or add(to, *args, **options))
    _add_up(total, terms)
    assert len(sizes) == 2 * pieces
    assert sum(sizes) == 2 * len(total)
    _add_up(torch.zeros(0, 3, device=device).double(), [torch.zeros(0, 3, device=device)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_expert_that_is_not_finite_is_named(zoo: Zoo, value: float) -> None:
    spoiled = zoo.experts["task1"]["visual.proj"].clone()
    spoiled[1, 2] = value
    inputs = replace(zoo.inputs(), experts={**zoo.experts, "task1": {**zoo.experts["task1"], "visual.proj": spoiled}})
    asks = (
        lambda: inputs.delta("task1", "visual.proj"),
        lambda: inputs.deltas("visual.proj"),
        lambda: inputs.total("visual.proj"),
    )
    for ask in asks:
        with pytest.raises(InputError, match=r"the expert of task task1 holds NaN or infinity in visual\.proj"):
            ask()
    assert inputs.delta("task0", "visual.proj").isfinite().all()


def test_only_layers_that_there_are_can_be_observed(zoo: Zoo) -> None:
    seen: list[Tensor] = []
    zoo.inputs().observe("task0", {LINEARS[0]: seen.append})
    assert sum(map(len, seen)) == zoo.images
    with pytest.raises(
        InputError, match=r"not a Linear layer of this encoder: visual\.nothing; its layers are visual\.transformer"
    ):
        zoo.inputs().observe("task0", {LINEARS[0]: seen.append, "visual.nothing": seen.append})
    with pytest.raises(InputError, match="needs proxy images, but none are configured"):
        replace(zoo.inputs(), run_proxies=None).observe("task0", {LINEARS[0]: seen.append})


def test_layers_are_chosen_by_their_kind() -> None:
    assert [linear.name for linear in linears_of_kind(INFOS, ("c_fc", "in_proj"))] == [
        name for name in LINEARS if name.endswith(("c_fc", "in_proj"))
    ]
    assert linears_of_kind(INFOS, ("c_proj",)) == [INFOS[3], INFOS[7]]
    for kinds in ((), ("c_fd",), ("c_fc", "c_fd")):
        with pytest.raises(InputError, match="but must name some of in_proj, out_proj, c_fc, c_proj"):
            linears_of_kind(INFOS, kinds)
    with pytest.raises(InputError, match="must name some"):
        linears_of_kind(INFOS[:1], ("c_fc",))
    with pytest.raises(InputError, match="the inputs have no Linear layers"):
        linears_of_kind((), ("c_fc",))


class Based(Merger):
    """Of any kind, whatever it says, and counts how often it is merged."""

    merged = 0

    def merge(self, inputs: MergeInputs) -> Merged:
        Based.merged += 1
        experts = LowRankExperts(torch.zeros(3, 4, 1), torch.zeros(3, 1, 4), HeldRouter(3))
        return Merged({}, routed={LINEARS[0]: experts})


class Dynamic(Based):
    kind = "dynamic"


class Oracle(Based):
    kind = "oracle"


def test_a_base_that_is_not_static_is_refused_before_it_is_merged(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Based, "merged", 0)
    for base, how in ((Dynamic(), "routed"), (Oracle(), "compressed")):
        with pytest.raises(InputError, match=f"base {type(base).__name__} has {how} experts itself; take a static one"):
            static_base(zoo.inputs(), base)
    assert Based.merged == 0
    with pytest.raises(InputError, match="base Based has routed experts itself"):
        static_base(zoo.inputs(), Based())
    assert Based.merged == 1, "which says that it is static"


def test_the_coefficient_is_the_methods_own_unless_somebody_chooses(zoo: Zoo) -> None:
    merged = Merged({"visual.proj": zoo.base["visual.proj"]}, scale=0.3)
    assert zoo.inputs().coefficient(merged) == 0.3
    assert replace(zoo.inputs(), choose_scale=lambda asked: 2 * asked.scale).coefficient(merged) == 0.6


def test_work_is_shared_out_by_size() -> None:
    seen: dict[str, int] = {}
    base = {"visual.proj": torch.zeros(3, 4), "visual.bias": torch.zeros(5)}

    def share(function: Callable[[str], Any], items: Mapping[str, int], description: str) -> dict[str, Any]:
        seen.update(items)
        return {item: function(item) for item in items}

    inputs = MergeInputs(base, {"task": base}, share=share)
    assert inputs.spread(len, [*base, "task"], "counting") == {"visual.proj": 11, "visual.bias": 11, "task": 4}
    assert seen == {"visual.proj": 36, "visual.bias": 5, "task": 1}


def test_parameters_alike_are_merged_together() -> None:
    shapes = {"b1": (3,), "w1": (4, 2), "b2": (3,), "w2": (4, 2), "w3": (4, 2), "v": (2, 4)}
    base = {key: torch.zeros(shape) for key, shape in shapes.items()}
    seen: list[list[str]] = []

    def merge(keys: list[str]) -> list[str]:
        seen.append(keys)
        return keys

    found = MergeInputs(base, {"task": base}).spread_alike(merge, base, "naming", 2)
    assert seen == [["w1", "w2"], ["w3", "v"], ["b1", "b2"]]
    assert list(found.items()) == [(key, key) for key in base]


@pytest.mark.parametrize("processes", [1, 2, 100])
def test_sums_over_tasks_hold_no_more_parts_than_processes_compute(processes: int) -> None:
    tasks, alive, most = [f"task{t}" for t in range(10)], WeakSet[Tensor](), 0
    shared, shown = list[list[str]](), list[tuple[list[str], str]]()

    def part(task: str) -> dict[str, tuple[Tensor, Tensor]]:
        nonlocal most
        index = int(task.removeprefix("task"))
        found = {name: (torch.full((2,), float(index + at)), torch.tensor(float(index**2))) for at, name in enumerate("ab")}
        alive.update(tensor for parts in found.values() for tensor in parts)
        most = max(most, len(alive))
        return found

    def share(function: Callable[[str], Any], items: Mapping[str, int], description: str) -> dict[str, Any]:
        shared.append(list(items))
        return {item: function(item) for item in items}

    def track(items: Iterable[str], description: str) -> Iterable[str]:
        shown.append((list(items), description))
        return items

    inputs = MergeInputs({}, {task: {} for task in tasks}, share=share, track=track, processes=processes)
    found = inputs.spread_sum(part, tasks, "adding up")
    assert {name: (sums[0].tolist(), sums[1].item()) for name, sums in found.items()} == {
        "a": ([45.0, 45.0], 285.0),
        "b": ([55.0, 55.0], 285.0),
    }
    together = processes
    assert shared == [tasks[at : at + together] for at in range(0, 10, together)]
    assert shown == [(tasks[::together], "adding up")]
    assert most <= 4 * (together + 1), "of two names, two tensors each: the sums and what is added"


def test_layers_that_cost_more_are_not_all_of_one_process() -> None:
    """An MLP's two layers are equally large, and alternate in the encoder: one process must not have all first ones."""
    seen: dict[str, int] = {}
    shapes = {"c_fc": (8, 2), "c_proj": (2, 8)}
    base = {f"{block}.{name}": torch.zeros(shape) for block in range(4) for name, shape in shapes.items()}
    inputs = MergeInputs(base, {"task": base}, share=lambda function, items, description: seen.update(items) or {})
    inputs.spread(len, base, "counting")
    owners = Counter((key.partition(".")[2], owner) for key, owner in assign_by_cost(seen, 2).items())
    assert owners == {("c_fc", 0): 2, ("c_fc", 1): 2, ("c_proj", 0): 2, ("c_proj", 1): 2}
