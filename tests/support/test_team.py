"""Work shared among processes: real processes and real messages, without a model."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, multiprocessing
from torch.distributed import broadcast_object_list, destroy_process_group, init_process_group

from mergekit_vision.errors import InputError
from mergekit_vision.merger import MergeInputs
from mergekit_vision.support.team import Team, assign_by_cost

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


def work(rank: int, place: str) -> None:
    init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    team, computed = Team(rank, 2, broadcast), []
    found = team.spread(lambda item: computed.append(item) or compute(item), ITEMS, "sharing", CPU)
    torch.save({"found": {item: part and dict(part) for item, part in found.items()}, "computed": computed}, f"{place}/{rank}.pt")

    def fails(item: str) -> None:
        if item == "dear":
            raise InputError("the expert is broken")

    try:
        team.spread(fails, ITEMS, "failing", CPU)
    except InputError as error:
        Path(place, f"{rank}.txt").write_text(str(error))
    try:
        team.agree(MemoryError("full") if rank == 1 else None)
    except Exception as error:
        Path(place, f"{rank}.agreed.txt").write_text(f"{type(error).__name__}: {error}")
    destroy_process_group()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they found."""
    directory = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(directory),), nprocs=2)
    return directory


def test_every_process_computes_a_share_and_gets_everything(place: Path) -> None:
    one, two = (torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert one["computed"] == ["dear"]
    assert two["computed"] == ["a", "b", "c", "absent"]
    for found in (one["found"], two["found"]):
        assert list(found) == list(ITEMS), "in the order that was asked for"
        assert found.pop("absent") is None
        for item, part in found.items():
            assert part[item].matrix.equal(torch.full((2, 3), float(ITEMS[item])))
            assert part[item].number == 0.5


def test_an_error_of_one_process_ends_all(place: Path) -> None:
    assert [(place / f"{rank}.txt").read_text() for rank in range(2)] == ["the expert is broken"] * 2


def test_what_is_no_mistake_of_the_user_is_no_input_error_elsewhere(place: Path) -> None:
    told = [(place / f"{rank}.agreed.txt").read_text() for rank in range(2)]
    assert told == ["RuntimeError: another process failed: full", "MemoryError: full"]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_no_process_has_much_more_to_do_than_another(size: int) -> None:
    items = {f"{layer}.{kind}": cost for layer in range(12) for kind, cost in (("fc", 12), ("qkv", 9), ("proj", 12), ("bias", 0))}
    owners = assign_by_cost(items, size)
    loads = [sum(items[item] for item, owner in owners.items() if owner == rank) for rank in range(size)]
    assert list(owners) == list(items)
    assert max(loads) - min(loads) <= max(items.values())


def test_a_merger_sees_sizes_shared_out() -> None:
    seen = {}
    base = {"visual.proj": torch.zeros(3, 4), "visual.bias": torch.zeros(5)}

    def share(function: Any, items: dict[str, int], description: str) -> dict[str, Any]:
        seen.update(items)
        return {item: function(item) for item in items}

    inputs = MergeInputs(base, {"task": base}, share=share)
    assert inputs.spread(len, [*base, "task"], "counting") == {"visual.proj": 11, "visual.bias": 11, "task": 4}
    assert seen == {"visual.proj": 12, "visual.bias": 5, "task": 1}
