"""Energy curves and task-vector similarity against the formulas written out in float64."""

from dataclasses import replace

import pytest
import torch
from synthetic import INFOS, LINEARS, Zoo, weight_key

from mergekit_vision.merger import LinearInfo
from mergekit_vision.merging.analysis import energy_curves, expert_analysis, task_similarity


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return Zoo(tasks=3)


def shares(zoo: Zoo, task: str, linear: str, directions: torch.Tensor) -> torch.Tensor:
    """Energy of the shifts that the first 1, 2, … of some orthonormal columns keep, by projecting them."""
    delta = (zoo.experts[task][weight_key(linear)] - zoo.base[weight_key(linear)]).double()
    shift = zoo.rows(task, linear) @ delta.T
    kept = [(shift @ directions[:, :k]).square().sum() for k in range(1, min(delta.shape) + 1)]
    return torch.stack(kept) / shift.square().sum()


@pytest.mark.parametrize("info", INFOS[:4], ids=lambda info: info.kind)
def test_energy_curves_are_those_of_projected_shifts(zoo: Zoo, info: LinearInfo) -> None:
    linear = info.name
    curve = energy_curves(zoo.inputs(), [info])[info.name]
    esd, svd = [], []
    for task in zoo.experts:
        delta = (zoo.experts[task][weight_key(linear)] - zoo.base[weight_key(linear)]).double()
        shift = zoo.rows(task, linear) @ delta.T
        esd.append(shares(zoo, task, linear, torch.linalg.svd(shift, full_matrices=False).Vh.T))
        svd.append(shares(zoo, task, linear, torch.linalg.svd(delta, full_matrices=False).U))
    torch.testing.assert_close(curve.esd, torch.stack(esd).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(curve.svd, torch.stack(svd).mean(0), rtol=1e-5, atol=1e-6)
    assert (curve.esd - curve.svd).min() > -1e-9, "no other basis keeps more"
    assert curve.svd[0] < curve.esd[0]


def test_an_expert_without_changes_counts_in_no_curve(zoo: Zoo) -> None:
    same = Zoo(tasks=3)
    same.experts["task1"] = dict(same.base)
    curve = energy_curves(same.inputs(), INFOS[:1])[LINEARS[0]]
    others = [energy_curves(zoo.inputs([index]), INFOS[:1])[LINEARS[0]] for index in (0, 2)]
    torch.testing.assert_close(curve.esd, (others[0].esd + others[1].esd) / 2)
    same.experts["task0"] = same.experts["task2"] = dict(same.base)
    assert energy_curves(same.inputs(), INFOS[:1]) == {}


def test_similarity_is_the_cosine_of_flattened_task_vectors(zoo: Zoo) -> None:
    flat = torch.cat([zoo.delta64(key).flatten(1) for key in zoo.base], 1)
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(task_similarity(zoo.inputs()), expected)


def test_similarity_with_an_unchanged_expert_is_zero() -> None:
    zoo = Zoo(tasks=2)
    zoo.experts["task0"] = dict(zoo.base)
    assert task_similarity(zoo.inputs()).tolist() == [[0, 0], [0, pytest.approx(1)]]


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
