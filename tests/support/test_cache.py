"""Values kept on disk: read again, spoiled, not writable, shared by processes."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hostile.contents import spliced
from hypothesis import given
from hypothesis import strategies as st
from spoiled import spoil

from mergekit_vision.errors import InputError
from mergekit_vision.support import cache_contents
from mergekit_vision.support.cache import Cache, json_form, tensor_form
from mergekit_vision.support.team import Team


def share(value: Any) -> float:
    if not (isinstance(value, float) and 0 <= value <= 1):
        raise ValueError("not a share")
    return value


SHARES = Cache("shares", json_form(share))


def counting(values: list[Any]) -> Callable[[], Any]:
    """Gives the next of ``values`` at each call, so that what is left says how often it was called."""
    return lambda: values.pop(0)


def test_a_value_is_computed_once_for_the_same_parts() -> None:
    values = [0.625, 0.5]
    assert [SHARES.recall(["a", "b"], counting(values)) for _ in range(3)] == [0.625] * 3
    assert SHARES.recall(["a", "c"], counting(values)) == 0.5
    assert values == []


def test_parts_are_told_apart_and_so_are_folders() -> None:
    values = list(range(5))
    caches = [Cache(folder, json_form(int)) for folder in ("one", "two")]
    found = [cache.recall(parts, counting(values)) for cache in caches for parts in (["a", "b"], ["b", "a"])]
    assert found == [0, 1, 2, 3]
    assert [cache.recall(["a", "b"], counting(values)) for cache in caches] == [0, 2]


def test_what_depends_on_something_unknown_is_not_kept(cache: Path) -> None:
    values = [0.1, 0.2]
    assert [SHARES.recall(None, counting(values)) for _ in range(2)] == [0.1, 0.2]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("spoiled", [b"", b"{", b"[]", b"null", b'"0.5"', b"\xff\xfe", b"\x00" * 100])
def test_a_spoiled_entry_is_computed_again_and_mended(cache: Path, spoiled: bytes) -> None:
    values = [0.5, 0.75]
    SHARES.recall(["key"], counting(values))
    (file,) = (cache / "shares").iterdir()
    file.write_bytes(spoiled)
    assert [SHARES.recall(["key"], counting(values)) for _ in range(2)] == [0.75, 0.75]


@given(data=st.data())
def test_no_changed_bytes_are_believed(cache: Path, data: st.DataObject) -> None:
    SHARES.recall(["key"], lambda: 0.5)
    (file,) = (cache / "shares").iterdir()
    whole = file.read_bytes()
    file.write_bytes(data.draw(spliced(whole)))
    assert SHARES.recall(["key"], lambda: 0.75) == 0.75
    assert SHARES.recall(["key"], lambda: pytest.fail("it is mended")) == 0.75
    file.write_bytes(whole)


def test_an_entry_under_another_name_is_none(cache: Path) -> None:
    SHARES.recall(["a"], lambda: 0.5)
    (file,) = (cache / "shares").iterdir()
    SHARES.recall(["b"], lambda: 0.25)
    (other,) = set((cache / "shares").iterdir()) - {file}
    other.write_bytes(file.read_bytes())
    assert SHARES.recall(["b"], lambda: 0.25) == 0.25


@pytest.mark.parametrize("content", [b"7.0", b"NaN", b'"0.5"', b"[0.5]", b"{}", b"", b"[" * 100_000])
def test_a_value_that_does_not_fit_is_computed_again_whatever_its_digest(cache: Path, content: bytes) -> None:
    SHARES.recall(["key"], lambda: 0.5)
    spoil(cache / "shares", content)
    assert SHARES.recall(["key"], lambda: 0.75) == 0.75


def test_many_at_once_each_get_one_whole_value(cache: Path) -> None:
    lists = Cache("lists", json_form(list))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: lists.recall(["key"], lambda: [number] * 1000), range(64)))
    assert all(len(value) == 1000 and len(set(value)) == 1 for value in found)
    assert lists.recall(["key"], lambda: pytest.fail("it is known")) in found


def test_what_is_no_file_is_not_waited_for(cache: Path) -> None:
    SHARES.recall(["key"], lambda: 0.5)
    (file,) = (cache / "shares").iterdir()
    file.unlink()
    os.mkfifo(file)
    assert SHARES.recall(["key"], lambda: 0.75) == 0.75
    file.unlink()
    file.mkdir()
    assert SHARES.recall(["key"], lambda: 0.75) == 0.75


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_cache_that_fails_in_any_way_is_one_warning(
    number: int, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    SHARES.recall(["key"], lambda: 0.5)
    monkeypatch.setattr(Path, "write_bytes", failing)
    monkeypatch.setattr(Path, "read_bytes", failing)
    with caplog.at_level(logging.WARNING, logger="mergekit_vision"):
        assert [SHARES.recall([key], lambda: 0.25) for key in ("key", "other")] == [0.25, 0.25]
    (record,) = caplog.records
    assert os.strerror(number) in record.getMessage()
    monkeypatch.undo()
    assert [path for path in (cache / "shares").iterdir() if path.name.startswith(".")] == []


def test_a_directory_that_cannot_be_written_to_is_one_warning_and_the_value_all_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = cache / "a file"
    blocked.touch()
    monkeypatch.setenv("MERGEKIT_VISION_CACHE", str(blocked))
    values = [0.1, 0.2, 0.3]
    with caplog.at_level(logging.WARNING, logger="mergekit_vision"):
        assert [SHARES.recall(["key"], counting(values)) for _ in range(3)] == [0.1, 0.2, 0.3]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{blocked}: cannot be written to (")


def test_a_link_to_nothing_above_the_directory_is_one_warning_at_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "link").symlink_to(cache / "nothing")
    monkeypatch.setenv("MERGEKIT_VISION_CACHE", str(cache / "link" / "a" / "b"))
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("nobody else is writing here"))
    with caplog.at_level(logging.WARNING, logger="mergekit_vision"):
        assert SHARES.recall(["key"], lambda: 0.5) == 0.5
    assert "cannot be written to (" in caplog.text


def test_a_directory_that_another_process_holds_is_one_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def held(path: Path) -> NoReturn:
        raise InputError(f"{path.parent}: another process is writing here")

    monkeypatch.setattr("mergekit_vision.support.cache.replacing", held)
    with caplog.at_level(logging.WARNING, logger="mergekit_vision"):
        assert SHARES.recall(["key"], lambda: 0.5) == 0.5
    assert "another process is writing here" in caplog.text


def test_plain_values_come_back_in_their_order(cache: Path) -> None:
    value = {"z": [1, 2.5, None], "a": {"y": True, "b": "text"}}
    entries = Cache("entries", json_form(dict[str, Any]))
    found = [entries.recall(["key"], counting([value])), entries.recall(["key"], counting([]))]
    assert [json.dumps(entry) for entry in found] == [json.dumps(value)] * 2
    (file,) = (cache / "entries").iterdir()
    assert json.loads(file.read_bytes().partition(b"\n")[2]) == value


@pytest.mark.parametrize("tensor", [torch.arange(6.0).view(2, 3).T, torch.zeros(0, 4), torch.ones(2, dtype=torch.bfloat16)])
def test_a_tensor_comes_back_bit_for_bit(cache: Path, tensor: torch.Tensor) -> None:
    tensors = Cache("tensors", tensor_form())
    for values in ([tensor], []):
        found = tensors.recall(["key"], counting(values))
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    (file,) = (cache / "tensors").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(tensors.recall(["key"], counting([tensor + 1])), tensor + 1)


def test_the_first_time_gives_what_later_times_give() -> None:
    """A tuple becomes a list on its way through JSON, at once and not only when it is read again."""
    lists = Cache("lists", json_form(list))
    assert lists.recall(["key"], lambda: (1, 2)) == lists.recall(["key"], lambda: pytest.fail("computed again")) == [1, 2]


def test_all_processes_take_the_first_ones_value(cache: Path) -> None:
    """Played in one process: what the first one sends, the second one receives. Only the first reads and writes."""
    sent: list[Any] = []
    first = Cache("shares", json_form(share), Team(0, 2, lambda value, _: sent.append(value) or value))
    second = Cache("shares", json_form(share), Team(1, 2, lambda value, _: sent.pop(0)))
    assert first.recall(["key"], lambda: 0.25) == 0.25
    assert second.recall(["key"], lambda: 0.5) == 0.25, "nothing was known: both compute, and the first one's counts"
    (file,) = (cache / "shares").iterdir()
    assert first.recall(["key"], lambda: pytest.fail("it is known")) == 0.25
    file.unlink()  # the second one's own directory may lie on another machine
    assert second.recall(["key"], lambda: pytest.fail("the first process has it")) == 0.25
    assert not file.exists()
    assert sent == []


def test_a_directory_that_another_process_removes_too_is_removed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is gone ends the removal of the others, which the other process may have given up for the same reason."""
    remove, calls = shutil.rmtree, list[Path]()

    def disturbed(place: Path) -> None:
        calls.append(place)
        if len(calls) == 1:
            raise FileNotFoundError(place / "gone")
        remove(place)

    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "left").touch()
    monkeypatch.setattr(shutil, "rmtree", disturbed)
    cache_contents._remove(tmp_path / "backbone")
    assert not (tmp_path / "backbone").exists()


def test_what_another_process_removes_while_it_is_counted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a file was looked at, and before."""

    class Removing:
        def fullmatch(self, name: str) -> bool:
            (cache / "shares" / name).unlink()
            return True

    SHARES.recall(["a"], lambda: 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(cache_contents, "_is_ours", lambda place: place.unlink() is None)
        assert [found.size for found in cache_contents.kept()] == [0]
    SHARES.recall(["a"], lambda: 0.5)
    assert cache_contents.kept()[0].size > 0
    monkeypatch.setattr(cache_contents, "_VALUE", Removing())
    assert cache_contents.kept() == []
