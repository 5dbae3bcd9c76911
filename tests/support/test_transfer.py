"""How far downloads are."""

import io
import time
from pathlib import Path

import pytest

from mergekit_vision.support import console
from mergekit_vision.support import transfer as module
from mergekit_vision.support.console import _Harmless, console_output
from mergekit_vision.support.transfer import bytes_below, transfer


def test_bytes_that_arrive_are_counted_once(tmp_path: Path) -> None:
    assert bytes_below(tmp_path / "nowhere") == 0
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "blob").write_bytes(bytes(1000))
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "blob")
    assert 1000 <= bytes_below(tmp_path) < 1500  # the link itself


def test_one_bar_shows_all_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(console, "console", _Harmless(force_terminal=True, file=shown, width=120))
    monkeypatch.setattr(console, "shows_bars", lambda: True)
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    with transfer(3000) as progress:
        with progress.of("one", tmp_path, 1000):
            (tmp_path / "x").write_bytes(bytes(1000))
        with progress.of("two", tmp_path, 2000):
            (tmp_path / "y").write_bytes(bytes(500))
            time.sleep(0.3)  # of looks every 0.01 s, the bar shows some
    assert "two" in shown.getvalue()
    assert "1.5/3.0 kB" in shown.getvalue()


def test_a_line_for_each_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with console_output(), transfer(3000) as progress:
        for name in ("one", "two"):
            with progress.of(name, tmp_path, 1000):
                (tmp_path / "x").write_bytes(bytes(1000))
        with pytest.raises(OSError, match="broken"), progress.of("three", tmp_path, 1000):
            raise OSError("broken")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("one: 1.0 kB in ")
    assert second == "two: was here, and is whole"
