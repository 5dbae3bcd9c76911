"""The papers' numbers: beside rows of the same method, settings and experts, and beside no others."""

from typing import Any

import pytest

from mergekit_vision.merger import Merger
from mergekit_vision.merging.record import merger_record
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.iso import IsoC
from mergekit_vision.plugins.regmean import RegMean
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.tsvm import TSVM
from mergekit_vision.runs.building import build_merger
from mergekit_vision.runs.papers import with_papers
from mergekit_vision.runs.variants import parameters
from mergekit_vision.suites.catalog import published
from mergekit_vision.suites.papers import published_numbers
from mergekit_vision.suites.suite import Suite

TALL, FUSION = "tall/ViT-B-32-8", "fusion_bench/ViT-B-32-8"


def number(suite: str, merger: Merger, tasks: int = 8, **settings: Any) -> float | None:
    """What is put beside a row, in percent."""
    proxies = {"proxies.n": 32, "proxies.split": "val", "proxies.seed": 0, "proxies.label": None, "proxies.source": None}
    given = {**parameters(merger), "scale": "search", "route": "router", **proxies, "tasks": tasks, **settings}
    row = {"kind": merger.kind, "merger": merger_record(merger), "settings": given, "tasks": dict.fromkeys(range(tasks))}
    (found,) = with_papers([row], 8, published_numbers(Suite.load(suite)))
    return None if found["published"] is None else round(100 * found["published"]["accuracy"], 1)


@pytest.mark.parametrize(
    ("suite", "merger", "settings", "expected"),
    [
        (TALL, ESM(), {}, 88.6),
        (TALL, ESM(), {"scale": "merger"}, 88.6),
        (TALL, ESM(), {"scale": 1.0}, None),
        (TALL, ESM(), {"proxies.n": 8}, None),
        (TALL, ESM(), {"proxies.source": {"folder": "photos"}}, None),
        (TALL, ESM(rank=4), {}, None),
        (TALL, TSVM(), {"proxies.n": 8}, 85.9),
        (TALL, ESMPP(rank=8), {}, 91.3),
        (TALL, ESMPP(), {}, 91.8),
        (TALL, ESMPP(), {"route": "oracle"}, None),
        (TALL, ESMPP(), {"expert_dtype": "float32"}, 91.8),
        (TALL, ESMPP(), {"expert_dtype": "bfloat16"}, None),
        (TALL, ESMPP(base=TIES()), {}, None),
        (TALL, RegMean(), {}, None),
        (FUSION, ESM(), {}, None),
        (FUSION, RegMean(), {"proxies.n": 256}, 82.4),
        (FUSION, TaskArithmetic(), {"scale": 0.3}, 68.0),
        (FUSION, TaskArithmetic(), {"scale": 0.4}, None),
        (FUSION, TIES(), {}, None),
        (FUSION, TIES(aggregate="sum"), {}, 72.2),
        ("fusion_bench/ViT-B-16-8", IsoC(), {}, None),
        ("tall/ViT-L-14-20", IsoC(), {"tasks": 8}, 87.6),
    ],
)
def test_a_number_is_of_the_same_method_and_settings(
    suite: str, merger: Merger, settings: dict[str, Any], expected: float | None
) -> None:
    assert number(suite, merger, **settings) == expected


def test_rows_on_fewer_tasks_have_none() -> None:
    assert number(TALL, TSVM(), tasks=4) is None


def test_every_method_of_the_papers_is_one_that_can_be_built() -> None:
    """Else its numbers would never be shown."""
    for suite in published():
        for found in published_numbers(Suite.load(suite)):
            assert isinstance(found.of, str) or build_merger(found.of)
