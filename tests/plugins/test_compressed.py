"""Compressed experts against their formulas, written plainly in float64 on whole task vectors, and their bytes."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from synthetic import Zoo
from torch import Tensor
from updates import assert_updates

from mergekit_vision.errors import InputError
from mergekit_vision.functional.masks import pack_bits, unpack_bits
from mergekit_vision.merger import Merger, static_base
from mergekit_vision.plugins.emr import EMR
from mergekit_vision.plugins.tall import TALLMasks
from mergekit_vision.plugins.tsvc import TSVC

T = 4
Formula = Callable[[Zoo], Mapping[str, Tensor]]


def tall(zoo: Zoo, t: int, threshold: float) -> dict[str, Tensor]:
    found = {}
    for key in zoo.base:
        total, delta = zoo.delta64(key).sum(0), zoo.delta64(key)[t]
        found[key] = torch.where(delta.abs() > threshold * (total - delta).abs(), total, 0.0)
    return found


def emr(zoo: Zoo, t: int) -> dict[str, Tensor]:
    unified, masks, own, masked = {}, {}, 0.0, 0.0
    for key in zoo.base:
        deltas = zoo.delta64(key)
        sign = deltas.sum(0).sign()
        unified[key] = sign * torch.where(deltas * sign > 0, deltas.abs(), 0.0).max(0).values
        masks[key] = deltas[t] * sign > 0
        own, masked = own + deltas[t].abs().mean(), masked + (masks[key] * unified[key]).abs().mean()
    return {key: own / masked * masks[key] * vector for key, vector in unified.items()}


def tsvc(zoo: Zoo, t: int, rank: int | None) -> dict[str, Tensor]:
    found = {}
    for key, value in zoo.base.items():
        deltas = zoo.delta64(key)
        if value.dim() == 2:
            U, S, Vh = torch.linalg.svd(deltas[t], full_matrices=False)
            k = min(value.shape) // T if rank is None else rank
            found[key] = U[:, :k] @ torch.diag(S[:k]) @ Vh[:k]
        else:
            found[key] = deltas.mean(0)
    return found


CASES: list[tuple[Merger, Callable[[int], Formula]]] = [
    (TALLMasks(), lambda t: lambda zoo: tall(zoo, t, 0.4)),
    (TALLMasks(threshold=1.5), lambda t: lambda zoo: tall(zoo, t, 1.5)),
    (EMR(), lambda t: lambda zoo: emr(zoo, t)),
    (TSVC(), lambda t: lambda zoo: tsvc(zoo, t, None)),
    (TSVC(rank=2), lambda t: lambda zoo: tsvc(zoo, t, 2)),
]


@pytest.mark.parametrize(("merger", "formula"), CASES, ids=lambda case: repr(case) if isinstance(case, Merger) else "")
def test_each_task_has_what_the_formula_says(merger: Merger, formula: Callable[[int], Formula]) -> None:
    zoo = Zoo(tasks=T)
    merged = merger.merge(zoo.inputs())
    assert list(merged.experts) == list(zoo.experts)
    for t, expert in enumerate(merged.experts.values()):
        assert_updates(expert.update(), formula(t), zoo)


def test_masks_take_a_bit_a_weight_and_factors_four_bytes_a_number() -> None:
    zoo = Zoo(tasks=T)
    whole = sum(value.numel() for value in zoo.base.values())
    bits = sum(math.ceil(value.numel() / 8) for value in zoo.base.values())
    ranks = {key: min(value.shape) // T for key, value in zoo.base.items() if value.dim() == 2}
    numbers = sum(rank * sum(zoo.base[key].shape) for key, rank in ranks.items())
    for merger, size, shared in ((TALLMasks(), bits, 4 * whole), (EMR(), bits + 4, 4 * whole), (TSVC(), 4 * numbers, 0)):
        merged = merger.merge(zoo.inputs())
        assert {expert.bytes for expert in merged.experts.values()} == {size}
        assert merged.shared_bytes == shared


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (3, 5), (2, 3, 7)])
def test_packed_masks_come_back(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_bits(mask)
    assert (packed.dtype, len(packed)) == (torch.uint8, math.ceil(mask.numel() / 8))
    assert torch.equal(unpack_bits(packed, mask.shape), mask)


@pytest.mark.parametrize("merger", [TALLMasks(), EMR(), TSVC()])
def test_of_one_task_nothing_but_rank_is_lost(merger: Merger) -> None:
    zoo = Zoo(tasks=1)
    update = merger.merge(zoo.inputs()).experts["task0"].update()
    for key in zoo.base:
        expected = zoo.delta64(key)[0]
        assert (update[key] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TALLMasks(threshold=-1.0), "threshold is -1.0"),
        (lambda: TSVC(rank=0), "rank is 0"),
        (lambda: static_base(Zoo(tasks=2).inputs(), EMR()), "EMR has compressed experts itself"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
