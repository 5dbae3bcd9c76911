"""What every registered merger promises, run on a small synthetic model with the default hyper-parameters."""

import inspect
import typing
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from synthetic import LINEARS, Zoo, shapes, weight_key
from tolerances import eps
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, Merger
from mergekit_vision.registry import broken, mergers
from mergekit_vision.routers import LowRankExperts

MERGERS = [pytest.param(cls, id=name) for name, cls in mergers().items()]
REORDERED = 100 * eps()
"""Relative change by tasks in another order: sums round otherwise, which a method may amplify, on this model a hundredfold."""
SEQUENTIAL = {"OPCM"}
"""Methods that take one task after the other, so that their order matters; each says so."""
every_merger = pytest.mark.parametrize("cls", MERGERS)


def added(experts: LowRankExperts) -> Tensor:
    """What each expert adds to its layer's weight, ``[T, d_out, d_in]``."""
    return experts.up.double() @ experts.down.double()


def assert_same(a: Merged, b: Merged, exactly: bool = True) -> None:
    assert a.update.keys() == b.update.keys()
    assert a.routed.keys() == b.routed.keys()
    assert (a.scale, a.fixed) == (b.scale, b.fixed)
    pairs = [(a.update[key], b.update[key]) for key in a.update]
    pairs += [(added(a.routed[name]), added(b.routed[name])) for name in a.routed]
    for x, y in pairs:
        assert x.equal(y) if exactly else (x - y).norm() <= REORDERED * y.norm()


def says_something(merged: Merged) -> bool:
    """Whether a model differs from the backbone at all."""
    return any(value.any() for value in merged.update.values()) or any(added(e).any() for e in merged.routed.values())


def tensors(zoo: Zoo) -> list[Tensor]:
    weights = [tensor for expert in (zoo.base, *zoo.experts.values()) for tensor in expert.values()]
    return weights + [x for layers in zoo.layer_inputs.values() for x in layers.values()]


def test_every_registered_merger_can_be_imported() -> None:
    assert not broken()


@every_merger
def test_inputs_are_not_changed_and_the_result_is_repeatable(cls: type[Merger]) -> None:
    zoo = Zoo(tasks=3)
    before = [tensor.clone() for tensor in tensors(zoo)]
    merger = cls()
    first = merger.merge(zoo.inputs())
    assert all(tensor.equal(copy) for tensor, copy in zip(tensors(zoo), before, strict=True))
    assert_same(first, merger.merge(zoo.inputs()))
    assert_same(first, cls().merge(Zoo(tasks=3).inputs()))


@every_merger
def test_the_update_owns_its_memory(cls: type[Merger]) -> None:
    zoo = Zoo(tasks=1)
    before = [tensor.clone() for tensor in tensors(zoo)]
    merged = cls().merge(zoo.inputs())
    assert merged.update or merged.routed
    for value in merged.update.values():
        value.fill_(7.0)
    for experts in merged.routed.values():
        experts.up.fill_(7.0)
        experts.down.fill_(7.0)
    assert all(tensor.equal(copy) for tensor, copy in zip(tensors(zoo), before, strict=True))


@every_merger
@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 30])
def test_any_number_of_tasks(cls: type[Merger], tasks: int) -> None:
    """1 to 3 ask some methods for more directions than there are, 7 divides no width, 30 is more than the width."""
    merged = cls().merge(Zoo(tasks=tasks).inputs())
    expected = shapes()
    assert merged.update.keys() <= expected.keys()
    assert merged.fixed <= merged.update.keys()
    for key, value in merged.update.items():
        assert (tuple(value.shape), value.dtype) == (expected[key], torch.float32)
        assert value.isfinite().all(), key
        assert not value.requires_grad
    assert says_something(merged)
    for name, experts in merged.routed.items():
        assert name in LINEARS
        assert len(experts.up) == len(experts.down) == tasks
        assert experts.up.dtype == experts.down.dtype == torch.float32
        assert added(experts).isfinite().all()


@every_merger
@pytest.mark.parametrize("tasks", [2, 5])
def test_the_order_of_the_tasks_does_not_matter(cls: type[Merger], tasks: int) -> None:
    if cls.__name__ in SEQUENTIAL:
        assert "order of the tasks" in " ".join((cls.__doc__ or "").split())
        return
    zoo = Zoo(tasks=tasks)
    order = [*range(1, tasks), 0]
    merged, permuted = cls().merge(zoo.inputs()), cls().merge(zoo.inputs(order))
    assert_same(Merged(permuted.update, permuted.scale, permuted.fixed), Merged(merged.update, merged.scale, merged.fixed), False)
    for name, experts in merged.routed.items():
        expected = added(experts)[order]
        assert (added(permuted.routed[name]) - expected).norm() <= REORDERED * expected.norm()


@every_merger
@pytest.mark.parametrize("tasks", [1, 3])
def test_experts_that_changed_nothing_give_nothing(cls: type[Merger], tasks: int) -> None:
    merged = cls().merge(Zoo(tasks=tasks, change=0.0).inputs())
    assert all(not value.any() for value in merged.update.values()), "an update, or NaN, of nothing"
    assert all(not added(experts).any() for experts in merged.routed.values())
    assert says_something(cls().merge(Zoo(tasks=tasks).inputs())), "of experts that changed something, there is one"


@every_merger
def test_a_parameter_that_no_expert_changed_stays(cls: type[Merger]) -> None:
    zoo = Zoo(tasks=3)
    frozen = ["visual.proj", "visual.conv1.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight"]
    for expert in zoo.experts.values():
        expert.update({key: zoo.base[key].clone() for key in frozen})
    merged = cls().merge(zoo.inputs())
    update = merged.update
    assert all(key not in update or not update[key].any() for key in frozen)
    for name, experts in merged.routed.items():
        assert bool(added(experts).any()) == (weight_key(name) not in frozen), name
    if cls.kind == "static":
        assert any(value.any() for value in update.values()), "and something else is merged"


@every_merger
def test_it_says_what_it_is(cls: type[Merger]) -> None:
    assert cls.title
    assert cls.title == cls.title.strip()
    assert cls.needs in ("none", "proxies", "labels")
    assert cls.kind in ("static", "dynamic", "oracle")
    assert isinstance(cls.paper, str)
    assert not {"title", "paper", "needs", "kind"} & inspect.signature(cls).parameters.keys(), "which are no hyper-parameters"


@every_merger
@pytest.mark.parametrize("tasks", [1, 3])
def test_its_kind_says_whether_experts_are_routed(cls: type[Merger], tasks: int) -> None:
    merged = cls().merge(Zoo(tasks=tasks).inputs())
    assert bool(merged.routed) == (cls.kind == "dynamic")
    assert bool(merged.experts) == (cls.kind == "oracle")
    assert says_something(merged)


@every_merger
def test_it_looks_at_proxy_images_only_where_it_says_so(cls: type[Merger]) -> None:
    zoo = Zoo(tasks=3)
    merged = cls().merge(zoo.inputs())
    without = replace(zoo.inputs(), run_proxies=None, streams=None, run_backward=None)
    if cls.needs == "none":
        assert zoo.asked == set()
        assert_same(merged, cls().merge(without))
    else:
        assert zoo.asked == zoo.experts.keys()
        with pytest.raises(InputError, match="proxy images"):
            cls().merge(without)


@every_merger
def test_each_of_its_words_says_whether_proxy_images_are_looked_at(cls: type[Merger]) -> None:
    assert cls().data_needs == cls.needs
    hints = {
        name: hint for name, hint in typing.get_type_hints(cls.__init__).items() if typing.get_origin(hint) is typing.Literal
    }
    for name, word in [(name, word) for name, hint in hints.items() for word in typing.get_args(hint)]:
        with suppress(InputError):  # as the other parameters go with another word
            merger, zoo = cls(**{name: word}), Zoo(tasks=2)
            merger.merge(zoo.inputs())
            assert merger.data_needs == ("proxies" if zoo.asked else "none"), f"{name}={word}"


@every_merger
def test_hyper_parameters_are_typed_kept_and_shown(cls: type[Merger]) -> None:
    parameters = inspect.signature(cls).parameters
    hints = typing.get_type_hints(cls.__init__)
    merger = cls()
    for name, parameter in parameters.items():
        assert name in hints, f"{name} has no type"
        assert parameter.default is not inspect.Parameter.empty, f"{name} has no default"
        assert getattr(merger, name) == parameter.default
        assert f"{name}={parameter.default!r}" in repr(merger)
        assert name in (cls.__doc__ or ""), f"{name} is not documented"
    assert vars(merger).keys() <= parameters.keys(), "a merger keeps its hyper-parameters and nothing else"
    merger.merge(Zoo(tasks=2).inputs())
    assert vars(merger).keys() <= parameters.keys()
