"""Consensus TA against its formula, written plainly in float64 on whole task vectors."""

from collections.abc import Callable

import pytest
import torch
from synthetic import Zoo
from torch import Tensor
from updates import assert_updates

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, MergeInputs, Merger
from mergekit_vision.plugins.consensus import ConsensusTA
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES


def consensus(deltas: Tensor, threshold: float, k: int, merged: Tensor | None = None) -> Tensor:
    """Masks of the tasks, voted on."""
    total = deltas.sum(0) if merged is None else merged
    masks = torch.stack([delta.abs() > threshold * (total - delta).abs() for delta in deltas])
    return torch.where(masks.sum(0) >= k, total, torch.zeros_like(total))


def of_zoo(threshold: float = 0.6, k: int = 2) -> Callable[[Zoo], dict[str, Tensor]]:
    """The merged update of a whole model."""
    return lambda zoo: {key: consensus(zoo.delta64(key), threshold, k) for key in zoo.base}


@pytest.mark.parametrize("tasks", [2, 3, 8, 30])
def test_the_published_formula(tasks: int) -> None:
    zoo = Zoo(tasks=tasks)
    merged = ConsensusTA().merge(zoo.inputs())
    assert (merged.scale, merged.fixed) == (0.3, frozenset())
    assert_updates(merged.update, of_zoo(), zoo)
    share = sum(int((value != 0).sum()) for value in merged.update.values()) / sum(value.numel() for value in zoo.base.values())
    assert 0.01 < share < 0.99, "all or nothing is masked: the test tests nothing"


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.5])
@pytest.mark.parametrize("agreeing", [0, 1, 3])
def test_options(threshold: float, agreeing: int) -> None:
    zoo = Zoo(tasks=5)
    assert_updates(ConsensusTA(threshold, agreeing).merge(zoo.inputs()).update, of_zoo(threshold, agreeing), zoo)


def test_without_a_vote_it_is_task_arithmetic() -> None:
    zoo = Zoo(tasks=4)
    found, expected = ConsensusTA(agreeing=0).merge(zoo.inputs()), TaskArithmetic().merge(zoo.inputs())
    assert found.scale == expected.scale
    for key, value in expected.update.items():
        torch.testing.assert_close(found.update[key], value)


@pytest.mark.parametrize("agreeing", [2, 99])
def test_no_more_tasks_must_agree_than_there_are(agreeing: int) -> None:
    zoo = Zoo(tasks=1)
    update = ConsensusTA(agreeing=agreeing).merge(zoo.inputs()).update
    assert all(value.equal(zoo.delta64(key)[0].float()) for key, value in update.items())


def test_consensus_ties() -> None:
    """The masks are cut from the merged vector of another method."""
    zoo, base = Zoo(tasks=5), TIES(density=0.2, aggregate="sum")
    merged, ties = ConsensusTA(base=base).merge(zoo.inputs()), base.merge(zoo.inputs())
    assert merged.scale == ties.scale == 1.0
    for key, value in ties.update.items():
        assert merged.update[key].equal(consensus(zoo.delta64(key), 0.6, 2, value.double()).float())


def test_the_keys_that_the_base_fixes_stay_fixed() -> None:
    zoo, base = Zoo(tasks=4), ESM()
    merged = ConsensusTA(base=base).merge(zoo.inputs())
    assert merged.fixed == base.merge(zoo.inputs()).fixed
    assert isinstance(merged.fixed, frozenset)


def test_what_the_base_leaves_out_or_no_expert_changed_is_left_out() -> None:
    class Partial(Merger):
        def merge(self, inputs: MergeInputs) -> Merged:
            return Merged({key: inputs.deltas(key).sum(0) for key in inputs.base if key != "visual.proj"})

    zoo = Zoo(tasks=2)
    for expert in zoo.experts.values():
        expert["visual.ln_post.weight"] = zoo.base["visual.ln_post.weight"].clone()
    assert zoo.base.keys() - ConsensusTA().merge(zoo.inputs()).update.keys() == {"visual.ln_post.weight"}
    found = ConsensusTA(base=Partial()).merge(zoo.inputs()).update
    assert zoo.base.keys() - found.keys() == {"visual.ln_post.weight", "visual.proj"}


def test_a_base_with_routed_experts_is_refused() -> None:
    with pytest.raises(InputError, match="base ESMPP has routed experts"):
        ConsensusTA(base=ESMPP(rank=2)).merge(Zoo(tasks=2).inputs())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ConsensusTA(threshold=-0.1), "threshold is -0.1"),
        (lambda: ConsensusTA(threshold=float("nan")), "threshold is nan"),
        (lambda: ConsensusTA(agreeing=-1), "agreeing is -1"),
        (lambda: ConsensusTA(agreeing=float("nan")), "agreeing is nan"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make: Callable[[], Merger], named: str) -> None:
    with pytest.raises(InputError, match=f"ConsensusTA: {named}"):
        make()
