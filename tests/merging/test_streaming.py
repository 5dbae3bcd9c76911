"""Reading ahead, with a stand-in for the device: the order, the bounds, the errors, and that nothing comes out differently."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TASKS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergekit_vision import merger
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.merger import Former, MergeInputs, Merger
from mergekit_vision.merging import streaming, workbench
from mergekit_vision.merging.streaming import Copies, _cuda_copies, copies_to, read_ahead
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.tsvm import TSVM
from mergekit_vision.support.team import ALONE, Team

CPU = torch.device("cpu")
KEYS = [f"visual.{index}" for index in range(6)]
LIMIT = 20.0
"""Seconds after which something hangs."""


class LateCopies:
    """Copies that hold NaN until they are waited for; some bytes of them may stay."""

    def __init__(self, room: int = 0) -> None:
        self._room = room
        self.threads: set[int] = set()
        self._made = list[weakref.ref[Tensor]]()

    @property
    def held(self) -> int:
        """How many of them are in memory."""
        return sum(made() is not None for made in self._made)

    def begin(self) -> None:
        self.threads.add(threading.get_ident())

    def pin(self, value: Tensor) -> Tensor:
        self.threads.add(threading.get_ident())
        return value.clone()

    def start(self, pinned: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        there = [torch.full_like(value, torch.nan) for value in pinned]
        self._made += map(weakref.ref, there)
        return there, list(pinned)

    def wait(self, there: Sequence[Tensor], end: list[Tensor]) -> None:
        for tensor, value in zip(there, end, strict=True):
            tensor.copy_(value)

    def room(self) -> int:
        return self._room - sum(tensor.nbytes for made in self._made if (tensor := made()) is not None)


class Slow(Mapping[str, Tensor]):
    """An expert that tells what is read of it, in which thread, and may be told to fail or to wait."""

    def __init__(self, value: float) -> None:
        self.value, self.reads = value, list[tuple[str, int]]()
        self.before: Callable[[str], Any] = lambda key: None

    def __getitem__(self, key: str) -> Tensor:
        self.reads.append((key, threading.get_ident()))
        self.before(key)
        return torch.full((2, 3), self.value)

    def __iter__(self) -> Iterator[str]:
        return iter(KEYS)

    def __len__(self) -> int:
        return len(KEYS)

    def times(self, key: str) -> int:
        return [name for name, _ in self.reads].count(key)


BASE = {key: torch.zeros(2, 3) for key in KEYS}


def inputs_of(experts: Mapping[str, Mapping[str, Tensor]], team: Team = ALONE, copies: Copies | None = None) -> MergeInputs:
    """A merger's inputs with experts that are read ahead, on a backbone of zeros."""
    given, share = read_ahead(experts, BASE, team, partial(team.spread, device=CPU), copies or LateCopies())
    return MergeInputs(BASE, given, share=share)


def until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not met():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.001)


@pytest.mark.parametrize("method", [TaskArithmetic(), TIES(), TSVM(), ESM()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("room", [0, 1 << 14, 1 << 30])
def test_methods_merge_the_same(method: Merger, room: int, tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench.open(VisionTasks(str(tiny_suite), proxies=Proxies(n=6)), Runtime(CPU))
    experts = {task: bench.evaluator.expert(task) for task in TASKS}
    before, copies = bench.merge(method, experts), LateCopies(room)
    monkeypatch.setattr(workbench, "copies_to", lambda device: copies)
    gc.disable()  # the device's memory must not wait for a collection of garbage
    try:
        after = bench.merge(method, experts)
        assert not copies.held
    finally:
        gc.enable()
    assert copies.threads - {threading.get_ident()}
    assert (after.update.keys(), after.scale, after.fixed) == (before.update.keys(), before.scale, before.fixed)
    assert all(torch.equal(after.update[key], value) for key, value in before.update.items())


class Opened(Mapping[str, Mapping[str, Tensor]]):
    """Experts that leave a model, and which of them were asked for."""

    def __init__(self, bench: Workbench, *tasks: str) -> None:
        self._bench, self._tasks, self.opened = bench, tasks, set[str]()

    def __getitem__(self, task: str) -> Mapping[str, Tensor]:
        self.opened.add(task)
        return self._bench.evaluator.expert(task)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


@pytest.mark.parametrize(("method", "asked"), [(TSVM(), False), (TaskArithmetic(), True)], ids=["TSVM", "TaskArithmetic"])
def test_an_expert_that_leaves_is_opened_only_for_a_method_that_asks(
    method: Merger, asked: bool, tiny_suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file may be gone."""
    bench, (first, *_) = Workbench.open(VisionTasks(str(tiny_suite)), Runtime(CPU)), TASKS
    merged = bench.merge(method, {task: bench.evaluator.expert(task) for task in TASKS}, keep=1)
    change = {key: merged.scale * merged.update.get(key, torch.zeros_like(value)) for key, value in bench.base.items()}
    former = Former(tuple(TASKS), change, merged.scale, merged.kept)
    plain = bench.revise(method, former, {}, Opened(bench, first))
    monkeypatch.setattr(workbench, "copies_to", lambda device: LateCopies())
    leaving = Opened(bench, first)
    ahead = bench.revise(method, former, {}, leaving)
    assert leaving.opened == ({first} if asked else set())
    assert all(torch.equal(ahead.update[key], value) for key, value in plain.update.items())


class Stream:
    """A stand-in for a stream of CUDA, which tells what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self._log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self._log.append(f"event on {self.name}")
        return f"event on {self.name}"

    def wait_event(self, event: str) -> None:
        self._log.append(f"{self.name} waits for {event}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of a device of CUDA that is not there."""
    found = list[str]()
    _cuda_copies.cache_clear()
    current, side = Stream("current", found), Stream("side", found)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        found.append(f"on {stream.name}")
        yield
        found.append(f"off {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.append(f"set to {device}"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: found.append(f"kept for {stream.name}"))
    with FakeTensorMode():  # knows shapes and devices, also of a device that is not there
        yield found
    _cuda_copies.cache_clear()


def test_copies_to_cuda_are_made_on_a_stream_of_their_own(log: list[str]) -> None:
    copies = copies_to(torch.device("cuda", 0))
    assert copies is not None
    assert copies_to(torch.device("cuda", 0)) is copies
    copies.begin()
    pinned = [copies.pin(torch.zeros(2, 3).half()), copies.pin(torch.zeros(3, 2).T)]
    assert [value.device.type for value in pinned] == ["cpu", "cpu"]
    there, end = copies.start(pinned)
    assert [(value.device.type, value.dtype, value.shape) for value in there] == [
        ("cuda", dtype, (2, 3)) for dtype in (torch.float16, torch.float32)
    ]
    copies.wait(there, end)
    copying = ["on side", "off side", "event on side"]
    assert log == ["set to cuda:0", *copying, "current waits for event on side", "kept for current", "kept for current"]


def test_what_is_on_the_device_already_is_not_copied_but_waited_for(log: list[str]) -> None:
    copies, value = copies_to(torch.device("cuda", 0)), torch.zeros(2, 3, device="cuda")
    assert copies is not None
    assert copies.pin(value) is value
    there, end = copies.start([value])
    assert there[0] is value
    assert log == ["side waits for current", "on side", "off side", "event on side"]
    assert end == log[-1]


def test_half_of_a_device_stays_free(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch holds in reserve is as good as free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15)
    copies = copies_to(torch.device("cuda", 0))
    assert copies is not None
    assert copies.room() == 50 + (20 - 15) - 80 // 2


def test_copies_are_made_ahead_for_cuda_alone() -> None:
    assert copies_to(CPU) is None


def test_one_parameter_is_read_while_the_one_before_is_merged_and_no_more() -> None:
    experts = {"a": Slow(1.0), "b": Slow(2.0)}
    copies = LateCopies()
    inputs = inputs_of(experts, copies=copies)

    def merged(key: str) -> float:
        at = KEYS.index(key)
        first = inputs.deltas(key).sum()
        until(lambda: all(expert.times(after) for expert in experts.values() for after in KEYS[at + 1 : at + 2]))
        time.sleep(0.01)  # to read on, were there no bound
        assert not any(expert.times(after) for expert in experts.values() for after in KEYS[at + 2 :])
        assert copies.held <= 2 * len(experts)
        return float(first)

    assert inputs.spread(merged, KEYS, "") == dict.fromkeys(KEYS, 2 * 3 * 3.0)
    for expert in experts.values():
        assert [key for key, _ in expert.reads] == KEYS
        assert threading.get_ident() not in {thread for _, thread in expert.reads}
    until(lambda: copies.held == 0)


def test_a_process_reads_what_it_merges_and_no_more() -> None:
    """Work is shared out by size, so that what comes next is not what lies next."""
    expert = Slow(1.0)
    team = Team(1, 2, lambda value, source: None if source == 0 else value)
    inputs = inputs_of({"a": expert}, team)
    computed: list[str] = []
    inputs.spread(lambda key: computed.append(key) or float(inputs.delta("a", key).sum()), KEYS, "")
    assert computed == [key for key, _ in expert.reads] == KEYS[1::2]


def test_what_is_not_merged_now_is_read_when_it_is_asked_for() -> None:
    """Also where work is shared out by task, and outside of it."""
    experts = {"a": Slow(1.0), "b": Slow(2.0)}
    inputs = inputs_of(experts)
    inputs.deltas(KEYS[0])  # and then it is known that there is no room for more
    for expert in experts.values():
        expert.reads.clear()

    def other(key: str) -> float:
        return float(inputs.delta("a", KEYS[-1 - KEYS.index(key)]).sum())

    assert inputs.spread(other, KEYS, "") == dict.fromkeys(KEYS, 6.0)
    assert inputs.spread(lambda task: float(inputs.delta(task, KEYS[0]).sum()), inputs.tasks, "") == {"a": 6.0, "b": 12.0}
    assert torch.equal(inputs.deltas(KEYS[2])[1], torch.full((2, 3), 2.0))
    here = threading.get_ident()
    by_key, by_task, outside = [(key, True) for key in KEYS[::-1]], [(KEYS[0], False)], [(KEYS[2], True)]
    assert [(key, thread == here) for key, thread in experts["a"].reads] == by_key + by_task + outside
    assert [(key, thread == here) for key, thread in experts["b"].reads] == by_task + outside


def test_one_task_is_read_while_the_one_before_is_worked_on() -> None:
    experts = {"a": Slow(1.0), "b": Slow(2.0), "c": Slow(3.0)}
    inputs = inputs_of(experts)

    def ahead(task: str) -> float:
        total = sum(float(inputs.delta(task, key).sum()) for key in KEYS[:3])
        after = {"a": "b", "b": "c"}.get(task)
        until(lambda: after is None or len(experts[after].reads) == 3)
        return total

    assert inputs.spread(ahead, inputs.tasks, "") == {"a": 18.0, "b": 36.0, "c": 54.0}
    assert all([key for key, _ in expert.reads] == KEYS[:3] for expert in experts.values())


SIZE = 24
"""Bytes of a parameter of 2 x 3 numbers."""


@pytest.mark.parametrize(("room", "again"), [(0, KEYS), (3 * SIZE + 1, KEYS[2:]), (1 << 40, [])])
def test_what_there_is_room_for_is_read_once(room: int, again: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just read counts already when the device is asked for room, from time to time."""
    monkeypatch.setattr(streaming, "PORTION", 2 * SIZE)
    expert = Slow(1.0)
    inputs = inputs_of({"a": expert}, copies=LateCopies(room))

    def summed(key: str) -> float:
        return float(inputs.delta("a", key).sum())

    first = inputs.spread(summed, KEYS, "")
    assert inputs.spread(summed, KEYS, "") == first == dict.fromkeys(KEYS, 6.0)
    assert {key: summed(key) for key in KEYS} == first
    assert [key for key in KEYS if expert.times(key) > 1] == again


def test_of_what_is_on_the_device_already_the_backbones_own_takes_no_room() -> None:
    """What was made there is kept, as the sum of the backbone and a stored difference."""

    class There(LateCopies):
        def pin(self, value: Tensor) -> Tensor:
            return torch.empty(value.shape, device="meta") if value.sum() == SIZE else super().pin(value)

        def start(self, pinned: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            return super().start([value if value.device.type == "cpu" else torch.full(value.shape, 4.0) for value in pinned])

    class Unchanged(Slow):
        def __getitem__(self, key: str) -> Tensor:
            super().__getitem__(key)
            return BASE[key]

    experts = {"own": Unchanged(0.0), "made": Slow(4.0), "read": Slow(1.0)}
    inputs = inputs_of(experts, copies=There((3 * len(KEYS) + 1) * SIZE))
    for _ in range(2):
        inputs.spread(inputs.deltas, KEYS, "")
    assert {task: expert.times(KEYS[0]) for task, expert in experts.items()} == {"own": 2, "made": 1, "read": 1}


def test_nothing_is_read_for_work_that_asks_for_no_expert() -> None:
    expert = Slow(1.0)
    assert inputs_of({"a": expert}).spread(len, KEYS, "") == dict.fromkeys(KEYS, 8)
    assert not expert.reads


def test_nothing_is_read_of_experts_that_work_does_not_ask_for() -> None:
    """To find a changed expert, one may do."""
    experts = {"a": Slow(1.0), "b": Slow(2.0)}
    assert all(inputs_of(experts).spread_changed(lambda key: True, KEYS, "").values())
    assert [key for key, _ in experts["a"].reads] == KEYS
    assert not experts["b"].reads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("experts")]


def test_where_the_device_has_no_memory_nothing_is_read_ahead() -> None:
    class Full(LateCopies):
        def start(self, pinned: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    experts = {"a": Adapted(1.0), "b": Slow(2.0)}
    inputs = inputs_of(experts, copies=Full(1 << 30))
    found = inputs.spread(inputs.deltas, KEYS, "")
    times = len(experts["b"].reads)
    assert all(torch.equal(found[key], inputs.deltas(key)) for key in KEYS)
    assert len(experts["b"].reads) == times + len(KEYS), "it is not tried again"


def test_a_parameter_is_read_once_however_often_it_is_asked_for() -> None:
    expert = Slow(1.0)
    inputs = inputs_of({"a": expert})
    inputs.spread_changed(lambda key: inputs.delta("a", key) + inputs.delta("a", key), KEYS, "")
    assert [key for key, _ in expert.reads] == KEYS


class Adapted(Slow):
    """The same for an adapter, of which one parameter is changed by a product."""

    def factors(self, key: str) -> tuple[Tensor, Tensor] | None:
        if key != KEYS[1]:
            return None
        self.reads.append((key, threading.get_ident()))
        return torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])


def test_of_adapters_the_factors_are_read() -> None:
    expert = Adapted(7.0)
    inputs = inputs_of({"a": expert})
    found = inputs.spread(lambda key: (inputs.delta("a", key), inputs.factors("a", key)), KEYS, "")
    assert torch.equal(found[KEYS[1]][0], torch.tensor([[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]]))
    assert [key for key in KEYS if found[key][1] is not None] == [KEYS[1]]
    assert torch.equal(found[KEYS[0]][0], torch.full((2, 3), 7.0))
    assert [key for key, _ in expert.reads] == KEYS
    assert inputs.factors("a", KEYS[1]) is not None


def test_the_host_does_not_look_at_what_the_reader_has_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a device for a number makes the host wait for it."""
    looked: list[Tensor] = []
    monkeypatch.setattr(merger, "largest_magnitude", lambda tensor: looked.append(tensor) or 0.0)
    inputs = inputs_of({"a": Slow(1.0)})
    inputs.spread(lambda key: inputs.delta("a", key), KEYS, "")
    assert not looked
    inputs.delta("a", KEYS[0])
    assert len(looked) == 1


class Stored(Slow):
    """The same with a value of any dtype in one parameter."""

    def __init__(self, value: Tensor) -> None:
        super().__init__(0.0)
        self.stored = value

    def __getitem__(self, key: str) -> Tensor:
        return self.stored if key == KEYS[3] else super().__getitem__(key)


@pytest.mark.parametrize(
    "value",
    [torch.tensor(torch.nan), torch.tensor(-torch.inf).half(), torch.tensor(1e39).double()],  # the last is finite as float64
    ids=lambda value: str(value.dtype),
)
def test_what_is_not_finite_is_refused_as_ever(value: Tensor) -> None:
    inputs, merged = inputs_of({"b": Slow(1.0), "a": Stored(value.expand(2, 3))}), list[str]()
    with pytest.raises(InputError, match=r"the expert of task a holds NaN or infinity in visual\.3"):
        inputs.spread(lambda key: merged.append(key) or inputs.deltas(key).sum(0), KEYS, "")
    assert merged == KEYS[:4]


def test_what_goes_wrong_in_reading_is_raised_where_the_parameter_is_merged() -> None:
    expert, merged = Slow(1.0), list[str]()

    def fail(key: str) -> None:
        if key == KEYS[3]:
            raise InputError("experts/a.pt: is truncated", of="experts")

    expert.before = fail
    inputs = inputs_of({"a": expert})
    with pytest.raises(InputError, match=r"experts/a\.pt: is truncated") as caught:
        inputs.spread(lambda key: merged.append(key) or inputs.delta("a", key), KEYS, "")
    assert (caught.value.of, merged) == ("experts", KEYS[:4])
    # what nobody asks for spoils nothing, and the next work reads ahead again
    assert list(inputs.spread(lambda key: inputs.delta("a", key), KEYS[:3], "")) == KEYS[:3]
    skipped = inputs.spread(lambda key: None if key == KEYS[3] else inputs.delta("a", key), KEYS, "")
    assert skipped[KEYS[3]] is None


def test_an_interruption_does_not_wait_for_the_disk() -> None:
    expert, disk = Slow(1.0), threading.Event()

    def hang(key: str) -> None:
        if key == KEYS[2]:
            disk.wait(LIMIT)

    def interrupted(key: str) -> Tensor:
        if key == KEYS[1]:
            inputs.delta("a", key)
            until(lambda: expert.times(KEYS[2]) == 1)
            raise KeyboardInterrupt
        return inputs.delta("a", key)

    expert.before = hang
    inputs, start = inputs_of({"a": expert, "b": Slow(2.0)}), time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            inputs.spread(interrupted, KEYS, "")
        assert time.monotonic() - start < LIMIT / 2
    finally:
        disk.set()
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("experts")]
    for thread in readers:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in readers)
    assert [key for key, _ in expert.reads] == KEYS[:3]
