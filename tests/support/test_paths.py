"""Paths that can be none, and files that are none."""

import os
from pathlib import Path

import pytest

from mergekit_vision.errors import InputError
from mergekit_vision.support.paths import expanded, is_directory, is_file, read_text


def test_home_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == Path("/home/me/x")
    assert expanded("a/~") == Path("a/~")
    for path in ("~nobody-of-this-name/x", "a\0b"):
        with pytest.raises(InputError):
            expanded(path)


def test_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    assert is_file(tmp_path / "file")
    assert is_directory(tmp_path)
    for none in (tmp_path / "pipe", tmp_path / "x", tmp_path / ("x" * 300), "a\0b", tmp_path / "file" / "x"):
        assert not is_file(none)
        assert not is_directory(none)


def test_text_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes("\ufeffgrün".encode())
    assert read_text(path, 10) == "grün"
    with pytest.raises(InputError, match="of 8 bytes, where 7 are the limit"):
        read_text(path, 7)
    for none, reason in ((tmp_path, "a directory"), (tmp_path / "y", "No such file"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(InputError, match=reason):
            read_text(none, 10)
