"""Energy curves and task-vector similarity against the formulas written out in float64."""

from dataclasses import replace

import pytest
import torch
from synthetic import INFOS, LINEARS, Zoo
from tolerances import assert_near, of_formula, sum_from_gram, summed
from torch import Tensor

from mergekit_vision.merger import LinearInfo
from mergekit_vision.merging.analysis import energy_curves, expert_analysis, task_similarity


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return Zoo(tasks=3)


def shares(delta: Tensor, rows: Tensor, directions: Tensor) -> Tensor:
    """Energy of the shifts that the first 1, 2, … of some orthonormal columns keep, by projecting them."""
    shift = rows @ delta.T
    kept = [(shift @ directions[:, :k]).square().sum() for k in range(1, min(delta.shape) + 1)]
    return torch.stack(kept) / shift.square().sum()


def curves(deltas: Tensor, *rows: Tensor) -> Tensor:
    """Both curves, averaged over the tasks, ``[2, directions]``."""
    found = []
    for delta, x in zip(deltas, rows, strict=True):
        essential = torch.linalg.svd(x @ delta.T, full_matrices=False).Vh.T
        found.append(
            torch.stack([shares(delta, x, side) for side in (essential, torch.linalg.svd(delta, full_matrices=False).U)])
        )
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("info", INFOS[:4], ids=lambda info: info.kind)
def test_energy_curves_are_those_of_projected_shifts(zoo: Zoo, info: LinearInfo) -> None:
    curve = energy_curves(zoo.inputs(), [info])[info.name]
    inputs = zoo.delta64(info.weight), *(zoo.rows(task, info.name) for task in zoo.experts)
    esd, svd = curves(*inputs)
    assert_near(curve.esd, esd, of_formula(lambda *moved: curves(*moved)[0], *inputs))
    assert_near(curve.svd, svd, of_formula(lambda *moved: curves(*moved)[1], *inputs))
    assert (curve.esd - curve.svd).min() > -sum_from_gram(len(esd), 1.0), "no other basis keeps more"
    assert curve.svd[0] < curve.esd[0]


def test_an_expert_without_changes_counts_in_no_curve(zoo: Zoo) -> None:
    same = Zoo(tasks=3)
    same.experts["task1"] = dict(same.base)
    curve = energy_curves(same.inputs(), INFOS[:1])[LINEARS[0]]
    others = [energy_curves(zoo.inputs([index]), INFOS[:1])[LINEARS[0]] for index in (0, 2)]
    assert_near(curve.esd, (others[0].esd + others[1].esd) / 2, summed(2, torch.float64))
    same.experts["task0"] = same.experts["task2"] = dict(same.base)
    assert energy_curves(same.inputs(), INFOS[:1]) == {}


def test_similarity_is_the_cosine_of_flattened_task_vectors(zoo: Zoo) -> None:
    flat = torch.cat([zoo.delta64(key).flatten(1) for key in zoo.base], 1)
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    assert_near(task_similarity(zoo.inputs()), expected, summed(flat.shape[1], torch.float64))


def test_similarity_with_an_unchanged_expert_is_zero() -> None:
    zoo = Zoo(tasks=2)
    zoo.experts["task0"] = dict(zoo.base)
    assert task_similarity(zoo.inputs()).tolist() == [[0, 0], [0, pytest.approx(1, rel=summed(3, torch.float64))]]


def test_description_without_proxy_images(zoo: Zoo, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mergekit_vision"):
        found = expert_analysis(replace(zoo.inputs(), run_proxies=None))
    assert found["energy"] == {}
    (record,) = caplog.records
    assert "proxy images" in record.getMessage()
    assert found["similarity"]["tasks"] == list(zoo.experts)


def test_description_samples_the_curves(zoo: Zoo) -> None:
    energy = expert_analysis(zoo.inputs())["energy"]
    assert list(energy) == list(LINEARS), "two blocks are the first and the last"
    curve = energy_curves(zoo.inputs(), INFOS[:1])[LINEARS[0]]
    assert energy[LINEARS[0]]["esd"] == [curve.esd[k - 1] for k in energy[LINEARS[0]]["directions"]]
    assert energy[LINEARS[0]]["per_task"] == 72 // 3
