import hashlib
import os
from pathlib import Path

import pytest

from mergekit_vision.errors import InputError
from mergekit_vision.support import files
from mergekit_vision.support.files import cache_dir, replacing
from mergekit_vision.support.fingerprints import fingerprint


def test_replacing_creates_parents_and_leaves_only_the_file(tmp_path: Path):
    target = tmp_path / "a" / "b" / "x.safetensors"
    with replacing(target) as draft:
        assert draft.parent == target.parent
        assert draft.suffix == target.suffix
        draft.write_bytes(b"new")
        assert not target.exists()
    assert [entry.name for entry in target.parent.iterdir()] == ["x.safetensors"]
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]):
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


def test_cache_dir_follows_the_variable(monkeypatch: pytest.MonkeyPatch, cache: Path):
    assert cache_dir() == cache
    monkeypatch.delenv("MERGEKIT_VISION_CACHE")
    assert cache_dir().name == "mergekit_vision"


@pytest.fixture
def settled(tmp_path: Path) -> Path:
    """A file whose time stamp is old enough to trust."""
    path = tmp_path / "expert.bin"
    path.write_bytes(b"abc" * 1_000_000)
    os.utime(path, ns=(10**18, 10**18))
    return path


def test_fingerprint_is_the_content_hash_and_is_read_once(settled: Path, monkeypatch: pytest.MonkeyPatch):
    expected = hashlib.blake2b(b"abc" * 1_000_000, digest_size=32).hexdigest()
    assert fingerprint(settled) == expected
    monkeypatch.setattr(files, "_hash", lambda path: pytest.fail("read again"))
    assert fingerprint(settled) == expected


def test_a_changed_file_is_hashed_anew(settled: Path):
    before = fingerprint(settled)
    settled.write_bytes(b"abd" * 1_000_000)
    assert fingerprint(settled) != before


def test_a_file_just_written_is_not_remembered(tmp_path: Path):
    path = tmp_path / "fresh"
    path.write_bytes(b"one")
    stamp = path.stat().st_mtime_ns
    before = fingerprint(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))  # the same size within the same tick of the clock
    assert fingerprint(path) != before


def test_broken_and_unwritable_memos_do_no_harm(settled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    expected = fingerprint(settled)
    (memo,) = (cache / "fingerprints").iterdir()
    for content in (b"", b"\xff\xfe", b"g" * 64):
        memo.write_bytes(content)
        assert fingerprint(settled) == expected
    blocked = cache / "a file"
    blocked.write_text("")
    monkeypatch.setenv("MERGEKIT_VISION_CACHE", str(blocked))
    assert fingerprint(settled) == expected


def test_fingerprint_names_a_missing_file(tmp_path: Path):
    with pytest.raises(InputError, match="nowhere"):
        fingerprint(tmp_path / "nowhere")
