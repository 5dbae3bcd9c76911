"""How a run ends: exit status, the one line on standard error, and what is left behind in the process."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mergekit_vision.cli.main import in_options, main
from mergekit_vision.errors import InputError
from mergekit_vision.plugins.average import Average

PLUGIN = """
from helper import GAIN
from mergekit_vision.merger import Merged, MergeInputs, Merger

class Half(Merger):
    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({key: GAIN * inputs.deltas(key).sum(0) for key in inputs.base})
"""


@pytest.fixture
def command(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    monkeypatch.chdir(tmp_path)
    return ["test", "--suite", str(tiny_suite), "--merger", "Average", "--output", "out"]


def fail(*_: object) -> None:
    raise ZeroDivisionError("nobody thought of this")


def test_a_bug_is_one_line_that_names_the_file_of_its_traceback(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Average, "merge", fail)
    monkeypatch.setattr(sys, "argv", ["mergekit-vision", "su\udce9te.yaml"])  # what a name that is no UTF-8 becomes
    assert main(command) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: nobody thought of this" in line
    assert "bug" in line
    file = Path(re.search(r"traceback in (\S+) ", line)[1])
    text = file.read_text()
    file.unlink()
    assert "Traceback" in text
    assert "in fail" in text


@pytest.mark.parametrize("place", [0, 1, -1])
def test_debug_shows_the_traceback_wherever_it_stands(
    command: list[str], place: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Average, "merge", fail)
    command.insert(place if place >= 0 else len(command), "--debug")
    assert main(command) == 70
    assert "in fail" in capsys.readouterr().err


def test_debug_shows_where_a_mistake_was_found(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--experts", "[moon]", "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("mergekit-vision: error: --experts ['moon']")


def test_an_error_of_the_library_names_arguments_and_that_of_the_program_options() -> None:
    error = InputError("give one of `merger` and `merged`", of="model")
    assert str(error) == "give one of `merger` and `merged`"
    assert in_options(error) == "give one of --merger and --merged"
    assert in_options(InputError("`default_root_dir` x: is a file", of="trainer")) == "--output x: is a file"
    assert in_options(InputError("a source is `parquet`")) == "a source is `parquet`"
    assert in_options(InputError("`tasks`: strips (did you mean `stripes`?)", of="data")).endswith("(did you mean `stripes`?)")


def test_nothing_is_left_behind_in_the_process(command: list[str]) -> None:
    def state() -> tuple[object, ...]:
        mask = os.umask(0)
        os.umask(mask)
        loggers = [logging.getLogger(name) for name in ("", "mergekit_vision", "lightning.pytorch", "lightning.fabric")]
        levels = [(each.level, list(each.handlers), list(each.filters)) for each in loggers]
        return sys.argv.copy(), sys.path.copy(), mask, logging.root.manager.disable, levels, list(warnings.filters)

    main(command)  # what torch and Lightning leave behind at their first use is theirs
    before = state()
    assert main(command) == 0
    assert main([*command, "--scale", ".inf"]) == 1
    assert state() == before


@pytest.mark.parametrize("module", [True, False])
def test_nothing_beside_the_user_is_imported_but_a_merger(tiny_suite: Path, tmp_path: Path, module: bool) -> None:
    for name in ("torch_xla", "tensorboard", "wandb"):  # what libraries look for
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')")
    (tmp_path / "helper.py").write_text("GAIN = 0.5")
    (tmp_path / "mine.py").write_text(PLUGIN)
    program = [sys.executable, "-m", "mergekit_vision"] if module else [str(Path(sys.executable).with_name("mergekit-vision"))]
    options = ["--suite", str(tiny_suite), "--merger", "mine.Half", "--output", "out"]
    subprocess.run([*program, "test", *options], cwd=tmp_path, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert json.loads((tmp_path / "out" / "results.json").read_text())["merger"]["class_path"] == "mine.Half"
    assert not (tmp_path / "imported").exists()


def test_a_suite_file_that_is_not_there_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").touch()
    script = (
        "import sys; from mergekit_vision.cli.main import main; status = main(['merge', '-m', 'TIES', '-s', 'suit.yaml']); "
        "sys.exit(status + 10 * ('torch' in sys.modules or 'lightning' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("suit.yaml: cannot be read (no such file) (did you mean `suite.yaml`?)\n")


def test_help_needs_no_suite(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "-s", "none.yaml", "--help"])
    assert "options that matter" in capsys.readouterr().out
