"""Several files replaced in one step: wherever a process is killed, a directory holds the old set or the new one."""

import errno
import itertools
import os
from pathlib import Path

import pytest
from killing import at_once, files_in, killed_at

from mergekit_vision.support.switching import replacing_set, settle, unsettled

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed in a fork")

NAMES = ("a", "b", "c", "d")
OLD = {"a": b"old a", "b": b"old b", "c": b"old c"}
NEW = {"b": b"new b", "c": b"new c", "d": b"new d"}
USERS = {"config.yaml": b"the user's"}


def write(directory: Path, files: dict[str, bytes]) -> None:
    with replacing_set(directory, lambda: NAMES, deciding="b") as draft:
        for name, content in files.items():
            (draft / name).write_bytes(content)


def settled(directory: Path) -> dict[str, bytes]:
    """All that a directory holds, of which nothing is a link or a folder."""
    assert all(path.is_file() and not path.is_symlink() for path in directory.iterdir())
    return files_in(directory)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path, OLD)
    (tmp_path / "config.yaml").write_bytes(USERS["config.yaml"])
    assert settled(tmp_path) == OLD | USERS
    return tmp_path


def test_a_new_set_replaces_the_old_one_and_nothing_else(directory: Path) -> None:
    write(directory, NEW)
    assert settled(directory) == NEW | USERS
    assert not unsettled(directory)


@pytest.mark.parametrize("first", [{}, OLD], ids=["into an empty directory", "over another set"])
def test_killed_before_any_file_operation_the_old_or_the_new_set_is_there_whole(first: dict[str, bytes], tmp_path: Path) -> None:
    found = set()
    for number in itertools.count():
        directory = tmp_path / str(number)
        if first:
            write(directory, first)
        else:
            directory.mkdir()
        if not killed_at(number, lambda place=directory: write(place, NEW)):
            break
        now = files_in(directory)
        assert now in (first, NEW)
        found.add(frozenset(now))
        write(directory, NEW)
        assert settled(directory) == NEW
    assert found == {frozenset(first), frozenset(NEW)}
    assert number > 20


@pytest.mark.parametrize("step", [10, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_while_it_cleans_up_after_a_killed_one(tmp_path_factory: pytest.TempPathFactory, step: int) -> None:
    third = {"a": b"third a", "d": b"third d", "b": b"third b"}
    for first, second in itertools.product(range(12, 42, step), repeat=2):
        place = tmp_path_factory.mktemp("place")
        write(place, OLD)
        killed_at(first, lambda place=place: write(place, NEW))
        killed_at(second, lambda place=place: write(place, third))
        assert files_in(place) in (OLD, NEW, third)
        write(place, NEW)
        assert settled(place) == NEW


def test_who_writes_nothing_leaves_the_old_set(directory: Path) -> None:
    write(directory, {})
    assert settled(directory) == OLD | USERS


def test_an_error_leaves_the_old_set(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        with replacing_set(directory, lambda: NAMES, deciding="b") as draft:
            (draft / "b").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert settled(directory) == OLD | USERS

    real, calls = Path.symlink_to, itertools.count()

    def fills_up(self: Path, target: Path) -> None:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, target)

    monkeypatch.setattr(Path, "symlink_to", fills_up)
    with pytest.raises(OSError, match="No space left"):
        write(directory, NEW)
    assert settled(directory) == OLD | USERS


def test_two_at_once_leave_one_of_both_whole(tmp_path: Path) -> None:
    def often(files: dict[str, bytes]) -> None:
        for _ in range(30):
            write(tmp_path, files)

    at_once(lambda: often(OLD), lambda: often(NEW), lambda: often(OLD))
    assert settled(tmp_path) in (OLD, NEW)


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EPERM, "no links"), pytest.param(NotImplementedError(), marks=pytest.mark.slow)]
)
def test_without_symbolic_links_the_deciding_file_goes_first_and_comes_last(
    directory: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuses(*_: object) -> None:
        raise error

    monkeypatch.setattr(Path, "symlink_to", refuses)
    for number in itertools.count(5):
        if not killed_at(number, lambda: write(directory, NEW)):
            break
        now = files_in(directory)
        assert now in (OLD | USERS, NEW | USERS) or ("b" not in now and unsettled(directory))
        monkeypatch.undo()
        write(directory, OLD)
        monkeypatch.setattr(Path, "symlink_to", refuses)
    assert settled(directory) == NEW | USERS


def test_a_file_system_without_hard_links_gets_copies(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuses)
    write(directory, NEW)
    assert settled(directory) == NEW | USERS


def below(directory: Path) -> dict[str, bytes]:
    """What a reader finds in a directory and its folders."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".mergekit-vision")}


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_files_in_folders_are_replaced_likewise(tmp_path: Path, step: int) -> None:
    old = {"a": b"old a", "left/deep/b": b"old b", "both/c": b"old c"}
    new = {"a": b"new a", "both/c": b"new c", "right/deep/d": b"new d"}

    def write_below(directory: Path, files: dict[str, bytes]) -> None:
        with replacing_set(directory, lambda: {*old, *new}, deciding="a") as draft:
            for name, content in files.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                (draft / name).write_bytes(content)

    found = set()
    for number in itertools.count(0, step):
        directory = tmp_path / str(number)
        write_below(directory, old)
        if not killed_at(number, lambda place=directory: write_below(place, new)):
            break
        assert below(directory) in (old, new)
        found.add(below(directory) == new)
        settle(directory)
        assert below(directory) in (old, new)
        assert not any(path.is_symlink() for path in directory.rglob("*"))
        work = directory / ".mergekit-vision"  # killed before there was anything in it, it stays, empty
        assert not work.exists() or not any(work.iterdir())
    assert found == {False, True}
    assert below(directory) == new
    assert sorted(path.name for path in directory.iterdir()) == ["a", "both", "right"]


def test_a_directory_that_was_not_there_is_not_there_after_an_error(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replacing_set(tmp_path / "new", lambda: NAMES, deciding="b") as draft:
            (draft / "b").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_others_left_there_is_not_put_elsewhere(tmp_path: Path) -> None:
    """A directory from anyone may look as if a process had been killed in it."""
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    (place / ".mergekit-vision/set/new/out").mkdir(parents=True)
    elsewhere.mkdir()
    (place / ".mergekit-vision/set/new/out/x").touch()
    (place / ".mergekit-vision/set/new/y").touch()
    (place / ".mergekit-vision/set/current").symlink_to("new")
    (place / "out").symlink_to(elsewhere)
    settle(place)
    assert list(elsewhere.iterdir()) == []
    assert {path.name for path in place.iterdir()} == {"out", "y"}
    (elsewhere / "mine").touch()
    (place / ".mergekit-vision/set").mkdir(parents=True)
    (place / ".mergekit-vision/set/new").symlink_to(elsewhere)
    (place / ".mergekit-vision/set/current").symlink_to("new")
    settle(place)
    assert [path.name for path in elsewhere.iterdir()] == ["mine"]
