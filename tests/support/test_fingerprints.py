"""Content hashes, and when a file is not read for one."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from mergekit_vision.errors import InputError
from mergekit_vision.support.fingerprints import digest, fingerprint, of_tensors, stamps


@pytest.fixture
def settled(tmp_path: Path) -> Path:
    """A file whose time stamp is old enough to trust."""
    path = tmp_path / "expert.bin"
    path.write_bytes(b"abc" * 1_000_000)
    os.utime(path, ns=(10**18, 10**18))
    return path


def test_fingerprint_is_the_content_hash_and_is_read_once(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashlib.blake2b(b"abc" * 1_000_000, digest_size=32).hexdigest()
    opened, read = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args, **options: opened.append(self) or read(self, *args, **options))
    assert [fingerprint(settled) for _ in range(3)] == [expected] * 3
    assert opened.count(settled) == 1


def test_a_changed_file_is_hashed_anew(settled: Path) -> None:
    before = fingerprint(settled)
    settled.write_bytes(b"abd" * 1_000_000)
    assert fingerprint(settled) != before


def test_a_changed_file_of_the_same_time_is_hashed_anew(settled: Path) -> None:
    before, stamp = fingerprint(settled), settled.stat().st_mtime_ns
    settled.write_bytes(b"abd" * 1_000_000)
    os.utime(settled, ns=(stamp, stamp))  # as programs do that copy a file with its time
    assert fingerprint(settled) != before


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "fresh"
    path.write_bytes(b"one")
    stamp = path.stat().st_mtime_ns
    before = fingerprint(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))  # the same size within the same tick of the clock
    assert fingerprint(path) != before


def test_broken_and_unwritable_memos_do_no_harm(settled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fingerprint(settled)
    (memo,) = (cache / "fingerprints").iterdir()
    for content in (b"", b"\xff\xfe", b"g" * 64):
        memo.write_bytes(content)
        assert fingerprint(settled) == expected
    blocked = cache / "a file"
    blocked.write_text("")
    monkeypatch.setenv("MERGEKIT_VISION_CACHE", str(blocked))
    assert fingerprint(settled) == expected


def test_fingerprint_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        fingerprint(tmp_path / "nowhere")


def test_equal_tensors_have_one_hash_and_others_have_others() -> None:
    matrix = torch.arange(6.0).view(2, 3)
    same = {"a": matrix, "b": matrix.T}, {"b": matrix.T.contiguous(), "a": matrix.clone().requires_grad_()}
    assert of_tensors(same[0]) == of_tensors(same[1])
    others = [
        {"a": matrix},
        {"b": matrix},
        {"a": matrix + 1},
        {"a": matrix.view(3, 2)},
        {"a": matrix.double()},
        {"a": matrix.view(torch.int32)},
        {"a": matrix, "b": matrix},
        {},
    ]
    assert len({of_tensors(tensors) for tensors in others}) == len(others)
    assert of_tensors({"a": torch.ones(2, dtype=torch.bfloat16)}) == of_tensors({"a": torch.ones(2, dtype=torch.bfloat16)})


def test_plain_values_are_told_apart() -> None:
    assert digest("a", 1) == digest("a", 1)
    assert len({digest("a", 1), digest("a1"), digest("a", "1"), digest(("a", 1)), digest(1, "a")}) == 5


def test_stamps_of_a_directory_follow_its_files(tmp_path: Path) -> None:
    assert stamps(tmp_path / "nowhere") == stamps(tmp_path) == []
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x").write_text("abc")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    ((name, size, _),) = stamps(tmp_path)
    assert (name, size) == ("deep/x", 3)


def test_stamps_of_a_directory_in_which_files_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("early", "late", "here"):
        (tmp_path / name).write_text(name)
    look = Path.stat

    def removing(self: Path, **options: bool) -> os.stat_result:
        if self.name == "early":
            self.unlink(missing_ok=True)
        found = look(self, **options)
        if self.name == "late":
            self.unlink()
        return found

    monkeypatch.setattr(Path, "stat", removing)
    assert {name for name, *_ in stamps(tmp_path)} - {"late"} == {"here"}
