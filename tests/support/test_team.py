"""Work shared among processes: real processes and real messages, without a model."""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.distributed import broadcast_object_list, init_process_group

from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.support.cache import Cache, json_form
from mergekit_vision.support.team import ALONE, Team, assign_by_cost

ITEMS = {"dear": 100, "a": 1, "b": 1, "c": 1, "absent": 1}
CPU = torch.device("cpu")


class Part(NamedTuple):
    matrix: Tensor
    number: float


def compute(item: str) -> dict[str, Part] | None:
    if item == "absent":
        return None
    return {item: Part(torch.full((2, 3), float(ITEMS[item])), 0.5)}


def broadcast(value: Any, source: int) -> Any:
    box = [value]
    broadcast_object_list(box, src=source)
    return box[0]


def told(team: Team, failure: Exception | None) -> tuple[str, str, str | None]:
    """How a failure of this process, or of another one, is heard here."""
    try:
        team.raise_together(failure)
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "of", None)
    return "nothing", "", None


def work(rank: int, place: str) -> None:
    init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    team, computed = Team(rank, 2, broadcast), []
    found = team.spread(lambda item: computed.append(item) or compute(item), ITEMS, "sharing", CPU)

    def fails(item: str) -> None:
        if item == "dear":
            raise InputError("the expert is broken")

    try:
        team.spread(fails, ITEMS, "failing", CPU)
    except InputError as error:
        spread = str(error)
    heard = {
        "memory": told(team, MemoryError("full") if rank == 1 else None),
        "argument": told(team, InputError("`scale` is inf", of="model") if rank == 0 else None),
        "image": told(team, EvaluationError("x.png: not a readable image") if rank == 1 else None),
        "nothing": told(team, None),
    }
    cache = Cache("numbers", json_form(int), team)
    remembered = [cache.recall(["key"], lambda: 10 + rank), cache.recall(["key"], lambda: 20 + rank)]
    gathered = team.gather({"rank": rank, "value": torch.full((2,), float(rank))})
    kept = {item: part and dict(part) for item, part in found.items()}
    torch.save(
        {
            "found": kept,
            "computed": computed,
            "spread": spread,
            "heard": heard,
            "remembered": remembered,
            "gathered": gathered,
        },
        f"{place}/{rank}.pt",
    )
    while not all(Path(place, f"{other}.pt").exists() for other in range(2)):
        time.sleep(0.01)  # the other one still talks to this one
    os._exit(0)  # the destructor of torch 2.4's group may wait for a thread that waits for Python's lock


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    directory = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEKIT_VISION_CACHE", str(directory / "cache"))
        multiprocessing.spawn(work, (str(directory),), nprocs=2)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_every_process_computes_a_share_and_gets_everything(reports: list[dict[str, Any]]) -> None:
    one, two = reports
    assert one["computed"] == ["dear"]
    assert two["computed"] == ["a", "b", "c", "absent"]
    for found in (one["found"], two["found"]):
        assert list(found) == list(ITEMS), "in the order that was asked for"
        assert found["absent"] is None
        for item in set(ITEMS) - {"absent"}:
            assert found[item][item].matrix.equal(torch.full((2, 3), float(ITEMS[item])))
            assert found[item][item].number == 0.5


def test_an_error_of_one_process_ends_all(reports: list[dict[str, Any]]) -> None:
    assert [report["spread"] for report in reports] == ["the expert is broken"] * 2


def test_what_is_no_mistake_of_the_user_is_no_input_error_elsewhere(reports: list[dict[str, Any]]) -> None:
    one, two = (report["heard"]["memory"] for report in reports)
    assert one == ("RuntimeError", "another process failed: full", None)
    assert two == ("MemoryError", "full", None)


def test_an_input_error_is_the_same_everywhere_and_knows_whose_argument_it_is_about(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["heard"]["argument"] == ("InputError", "`scale` is inf", "model")
        assert report["heard"]["image"] == ("EvaluationError", "x.png: not a readable image", None)
        assert report["heard"]["nothing"] == ("nothing", "", None)


def test_values_are_gathered_by_rank_on_every_process(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert [part["rank"] for part in report["gathered"]] == [0, 1]
        assert [part["value"].tolist() for part in report["gathered"]] == [[0.0, 0.0], [1.0, 1.0]]


def test_every_process_takes_the_first_ones_value_from_the_cache(reports: list[dict[str, Any]]) -> None:
    assert [report["remembered"] for report in reports] == [[10, 10]] * 2


def test_one_process_is_a_team_as_well() -> None:
    assert ALONE.gather("value") == ["value"]
    assert ALONE.spread(len, {"abc": 1, "": 2}, "counting", CPU) == {"abc": 3, "": 0}
    ALONE.raise_together(None)
    failure = InputError("`scale` is inf", of="model")
    with pytest.raises(InputError) as caught:
        ALONE.raise_together(failure)
    assert caught.value is failure


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_no_process_has_much_more_to_do_than_another(size: int) -> None:
    items = {f"{layer}.{kind}": cost for layer in range(12) for kind, cost in (("fc", 12), ("qkv", 9), ("proj", 12), ("bias", 0))}
    owners = assign_by_cost(items, size)
    loads = [sum(items[item] for item, owner in owners.items() if owner == rank) for rank in range(size)]
    assert list(owners) == list(items)
    assert max(loads) - min(loads) <= max(items.values())
