"""Messages: silent until somebody listens, lines and tables for whoever does."""

import io
import logging
import subprocess
import sys
import warnings

import pytest
from rich.errors import LiveError
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from mergekit_vision.support import console as module
from mergekit_vision.support.console import _Harmless, console_output, logger, quiet_lightning, show, track

INFO = {"level": "INFO", "logger": "mergekit_vision"}


def table() -> Table:
    made = Table(title="colors")
    made.add_column("class")
    made.add_row(escape("[red]"))
    return made


def speak() -> list[int]:
    logger.info("a line with [brackets]")
    show(table())
    return list(track([1, 2, 3], "counting"))


@pytest.fixture
def alone() -> None:
    """Without the handlers of the test runner, as in a program of its own."""
    before = logger.propagate
    logger.propagate = False
    yield
    logger.propagate = before


def test_nothing_is_said_unless_logging_is_configured() -> None:
    script = "from mergekit_vision.support.console import *; logger.info('a'); logger.warning('b'); print(*track('xy', 'c'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("x y\n", "")


@pytest.mark.usefixtures("alone")
def test_the_command_line_shows_lines_and_tables_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    speak()
    assert capsys.readouterr() == ("", "")
    level, handlers = logger.level, list(logger.handlers)
    with console_output():
        assert speak() == [1, 2, 3]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "a line with [brackets]"
    assert printed[-1].startswith("counting: 3 in ")
    assert "│ [red] │" in printed
    assert (logger.level, logger.handlers) == (level, handlers)
    speak()
    assert capsys.readouterr() == ("", "")


def test_a_context_ended_by_an_error_leaves_no_handler_behind() -> None:
    level, handlers = logger.level, list(logger.handlers)
    with pytest.raises(KeyboardInterrupt), console_output():
        raise KeyboardInterrupt
    assert (logger.level, logger.handlers) == (level, handlers)


def test_another_handler_gets_tables_as_text(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(**INFO):
        assert speak() == [1, 2, 3]
    line, drawn, progress = [record.getMessage() for record in caplog.records]
    assert line == "a line with [brackets]"
    assert "colors" in drawn
    assert "[red]" in drawn
    assert "\\" not in drawn
    assert progress.startswith("counting: 3 in ")


@pytest.mark.usefixtures("alone")
def test_bars_within_bars_where_rich_shows_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, opened = io.StringIO(), list[Live]()

    class Older(_Harmless):
        def set_live(self, live: Live) -> bool:
            if opened:  # as before rich 14.1
                raise LiveError("Only one live display may be active at once")
            opened.append(live)
            return super().set_live(live)

    monkeypatch.setattr(module, "console", Older(force_terminal=True, file=shown, width=120))
    with console_output():
        assert [list(track("ab", "inner")) for _ in track([0], "outer")] == [["a", "b"]]
    assert "outer" in shown.getvalue()
    assert "inner: 2 in " in shown.getvalue()


def test_only_the_first_process_speaks(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with caplog.at_level(**INFO):
        assert speak() == [1, 2, 3]
    assert caplog.records == []


def test_progress_goes_through_any_iterable_once_and_ends_early_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(**INFO):
        assert list(track(iter("ab"), "letters")) == ["a", "b"]
        next(iter(track("ab", "interrupted")))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["letters"]


def test_lightning_is_quiet_for_a_while_and_as_it_was_afterwards() -> None:
    lightning = logging.getLogger("lightning.pytorch")
    before, filters = lightning.level, list(warnings.filters)
    with quiet_lightning(), warnings.catch_warnings(record=True) as caught:
        assert not lightning.isEnabledFor(logging.INFO)
        warnings.warn("The 'test_dataloader' does not have many workers", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]
    assert (lightning.level, warnings.filters) == (before, filters)
