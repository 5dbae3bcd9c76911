import errno
import functools
import itertools
import os
import shutil
from pathlib import Path

import pytest
from killing import at_once, killed_at

from mergekit_vision.errors import InputError
from mergekit_vision.support.files import cache_dir, replacing
from mergekit_vision.support.locks import locked, remove_unused


def test_replacing_creates_parents_and_leaves_only_the_file(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "x.safetensors"
    with replacing(target) as draft:
        assert draft.stat().st_dev == target.parent.stat().st_dev
        assert draft.name == target.name
        draft.write_bytes(b"new")
        assert not target.exists()
    assert [entry.name for entry in target.parent.iterdir()] == ["x.safetensors"]
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")

    def interrupted() -> None:
        with replacing(target) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
    assert target.read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed in a fork")
def test_what_killed_processes_leave_is_removed_by_the_next_and_nothing_else_is(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")

    def write(content: str) -> None:
        with replacing(target) as draft:
            draft.write_text(content)

    for number in itertools.count():
        if not killed_at(number, lambda: write("new")):
            break
        assert target.read_text() in ("old", "new")
    assert number > 6
    (tmp_path / ".mergekit-vision" / "mine").mkdir(parents=True)
    with replacing(target) as draft:
        write("meanwhile")  # another's draft is in use, and stays
        assert draft.is_file()
    assert [path.name for path in (tmp_path / ".mergekit-vision").iterdir()] == ["mine"]
    (tmp_path / ".mergekit-vision" / "mine").rmdir()
    write("last")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.json": "last"}


def test_a_file_system_without_locks_is_written_to_and_never_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuses)
    left = tmp_path / ".mergekit-vision" / ("0" * 32)
    left.mkdir(parents=True)
    with replacing(tmp_path / "x.json") as draft:
        draft.write_text("new")
    assert (tmp_path / "x.json").read_text() == "new"
    assert left.is_dir()


def test_a_folder_is_used_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with locked(folder):
        remove_unused(folder)
        with pytest.raises(InputError, match=f"^{tmp_path}: another process is writing here"), locked(folder):
            pytest.fail("used by two")
    remove_unused(folder)
    assert not folder.exists()
    with locked(folder):
        pass


def test_a_folder_is_not_taken_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have made its folder, and not have locked it yet, when another takes it for one that was left."""
    pytest.importorskip("fcntl")
    folder, remove, tried = tmp_path / "work", shutil.rmtree, []

    def attempted(place: Path, **options: bool) -> None:
        with pytest.raises(InputError, match="another process is writing here"), locked(place):
            pytest.fail("taken, and about to be removed")
        tried.append(place)
        remove(place, **options)

    folder.mkdir()
    monkeypatch.setattr(shutil, "rmtree", attempted)
    remove_unused(folder)
    assert (tried, folder.exists()) == ([folder], False)


def test_who_has_the_lock_of_a_removed_folder_leaves_the_next_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes that look at a folder one removes it, and a third makes it anew before the other has the lock."""
    fcntl = pytest.importorskip("fcntl")
    folder, lock = tmp_path / "work", fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        remove_unused(folder)
        folder.mkdir()
        (folder / "lock").touch()
        lock(descriptor, operation)

    folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", late)
    remove_unused(folder)
    assert (folder / "lock").is_file()


@pytest.mark.parametrize("left", [False, True])
def test_nothing_stays_where_open_files_outlive_their_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """As on NFS, which renames them until they are closed."""
    remove, close = shutil.rmtree, os.close

    def renaming(place: Path, **options: bool) -> None:
        if (place / "lock").exists():
            (place / "lock").rename(place.parent / "kept")
            remove(place, **options)
            place.mkdir()
            (place.parent / "kept").rename(place / ".nfs1")

    def closing(descriptor: int) -> None:
        close(descriptor)
        for file in tmp_path.rglob(".nfs1"):
            file.unlink()

    monkeypatch.setattr(shutil, "rmtree", renaming)
    monkeypatch.setattr(os, "close", closing)
    if left:
        (tmp_path / ".mergekit-vision" / ("0" * 32)).mkdir(parents=True)
    with replacing(tmp_path / "x.json") as draft:
        draft.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
def test_processes_write_into_one_directory(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(50):
            with replacing(tmp_path / f"{number}.json") as draft:
                draft.write_text("new")

    at_once(*(functools.partial(write, number) for number in range(4)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number}.json" for number in range(4)]


def test_cache_dir_follows_the_variable(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_dir() == cache
    monkeypatch.delenv("MERGEKIT_VISION_CACHE")
    assert cache_dir().name == "mergekit_vision"


def test_a_new_file_has_the_mode_that_other_new_files_have(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "new") as draft:
        draft.unlink()
        draft.touch(mode=0o600)  # as some writers do
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", [None, "draft"])
def test_an_error_names_the_file_and_not_its_draft(tmp_path: Path, name: str | None) -> None:
    def fails() -> None:
        with replacing(tmp_path / "x.json") as draft:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name and str(draft))

    with pytest.raises(OSError, match="No space left on device") as caught:
        fails()
    assert caught.value.filename == str(tmp_path / "x.json")
