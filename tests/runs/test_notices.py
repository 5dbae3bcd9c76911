"""What the processes of a run know of each other when things happen at once, and when the store is gone."""

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.distributed import HashStore, Store, TCPStore

from mergekit_vision.runs import launcher, notices
from mergekit_vision.runs.launcher import Launcher
from mergekit_vision.runs.notices import Notices


def connected(store: Store, rank: int = 0, size: int = 3) -> Notices:
    """Notices in a given store, instead of that of a process group."""
    ours = Notices(rank, size, 1)
    ours._connected = lambda: store  # type: ignore[method-assign]
    return ours


def test_leaving_while_the_other_thread_connects() -> None:
    store, connects, goes_on = HashStore(), threading.Event(), threading.Event()
    ours = Notices(0, 2, 1)

    def slowly() -> Store:
        connects.set()
        goes_on.wait(10)
        return store

    ours._connected = slowly  # type: ignore[method-assign]
    joining, leaving = threading.Thread(target=ours.join), threading.Thread(target=ours.leave)
    joining.start()
    assert connects.wait(10)
    leaving.start()
    leaving.join(0.2)
    goes_on.set()
    joining.join()
    leaving.join()
    assert store.check(["place/0"])
    assert store.check(["left/0"])


def test_who_has_left_is_not_found_again() -> None:
    store = HashStore()
    ours = connected(store)
    ours.leave()
    ours.join()
    assert not store.check(["place/0"])


def test_a_process_found_while_others_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    ours = connected(store)
    connected(store, rank=1).join()
    ours.join()

    def runs(pid: int) -> bool:
        connected(store, rank=2).join()
        ours.join()  # as the other thread does
        return pid == os.getpid()

    monkeypatch.setattr(notices, "_runs", runs)
    assert ours.gone() is None


def test_a_store_that_is_gone_is_asked_once(capfd: pytest.CaptureFixture[str]) -> None:
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ours = connected(TCPStore("localhost", server.port, is_master=False, wait_for_workers=False))
    ours.join()
    assert ours.failures() == 0
    del server
    for _ in range(5):
        assert ours.failures() == 0
        assert ours.first_to_fail() is None
    assert capfd.readouterr().err.count("[c10d]") <= 1


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> LightningEnvironment:
    monkeypatch.setenv("LOCAL_RANK", "0")  # as where the processes have been started
    return LightningEnvironment()


def test_launches_of_one_script_have_numbers_of_their_own(
    environment: LightningEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []

    class Numbered(Notices):
        def __init__(self, rank: int, size: int, launch: int) -> None:
            super().__init__(rank, size, launch)
            numbers.append(launch)

    monkeypatch.setattr(launcher, "Notices", Numbered)
    for ours in (Launcher(environment, 1, 1), Launcher(environment, 1, 1)):
        ours.launch(int)
        ours.launch(int)
    assert len(set(numbers)) == 4


def test_the_thread_that_watches_waits_for_the_one_that_speaks(
    environment: LightningEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    main = threading.current_thread()

    class Failing(Launcher):
        def _gone(self) -> str:
            return "process 1 of 2 ended"

        def _speaks(self, lost: str | None) -> bool:
            first = threading.current_thread() is main
            time.sleep(1.3 * first)  # until the patience of the other thread has run out
            return first

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit

    monkeypatch.setattr(launcher, "_GRACE", 1.0)
    monkeypatch.setattr(launcher, "_POLL", 0.01)
    monkeypatch.setattr(os, "_exit", end)
    environment.set_world_size(2)

    def fail() -> None:
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        Failing(environment, 2, 1).launch(fail)
    assert not ended


def test_a_process_that_waits_ends_when_another_has_failed(
    environment: LightningEnvironment, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One on another machine, or of SLURM, of which only its notice is seen."""
    ended, waiting = list[int](), threading.Event()

    def end(status: int) -> None:
        ended.append(status)
        waiting.set()

    monkeypatch.setattr(launcher, "_GRACE", 0.05)
    monkeypatch.setattr(launcher, "_POLL", 0.01)
    monkeypatch.setattr(Notices, "failures", lambda _: 1)
    monkeypatch.setattr(os, "_exit", end)
    environment.set_world_size(2)
    Launcher(environment, 1, 2).launch(waiting.wait, 10)
    assert ended == [1]
    assert capfd.readouterr().err == ""


def test_children_are_known_to_the_launchers_after_the_one_that_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(launcher: _SubprocessScriptLauncher) -> None:
        launcher.procs = [SimpleNamespace(poll=lambda: -9, send_signal=sent.append)]

    sent = list[int]()
    monkeypatch.setattr(Launcher, "children", [])
    monkeypatch.setattr(_SubprocessScriptLauncher, "_call_children_scripts", start)
    first, second = Launcher(LightningEnvironment(), 2, 1), Launcher(LightningEnvironment(), 2, 1)
    assert second._gone() is None
    first._call_children_scripts()
    assert "process 1 of 1 was ended by SIGKILL" in (second._gone() or "")
    second.kill(signal.SIGTERM)
    assert sent == [signal.SIGTERM]
