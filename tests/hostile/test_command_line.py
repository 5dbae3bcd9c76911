"""Command lines and configuration files from anyone, ends that come from outside, and outputs that fail.

A case is what stands on the command line and what the one line on standard error says.
"""

import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mergekit_vision.cli.main import main
from mergekit_vision.plugins.average import Average
from mergekit_vision.runs.module import MergedCLIP
from mergekit_vision.support.files import CACHE_VARIABLE

BOMB = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
FILES: dict[str, bytes] = {
    "bomb.yaml": BOMB.encode(),
    "binary.yaml": bytes(range(256)),
    "deep.yaml": b"[" * 10_000,
    "digits.yaml": b"data: {batch_size: " + b"9" * 5000 + b"}",
    "list.yaml": b"[1, 2]",
    "empty": b"",
}

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}

CASES: dict[str, tuple[list[str], str]] = {
    "no suite": (["-s", ""], "--suite is empty"),
    "a directory as suite": (["-s", "."], "a directory, not a file"),
    "a pipe as suite": (["-s", "./pipe"], "a pipe or device, not a file"),
    "a device as suite": (["-s", "/dev/zero"], "a pipe or device, not a file"),
    "an empty suite": (["-s", "./empty"], "must be a mapping with the keys backbone, tasks, not empty"),
    "a binary suite": (["-s", "binary.yaml"], "not UTF-8 text"),
    "a bomb as suite": (["-s", "bomb.yaml"], "aliases stand for more than"),
    "a home that is none": (["-s", "~nobody-of-this-name/x"], "no home directory of such a user"),
    "a name too long": (["-s", "x" * 300], "neither a file nor a built-in suite"),
    "a path too long": (["-s", "x." * 300], "File name too long"),
    "escape codes in a path": (["-s", "\x1b[2J.yaml"], "\ufffd[2J.yaml: cannot be read"),
    "a bomb as configuration": (["-c", "bomb.yaml"], "aliases stand for more than"),
    "a binary configuration": (["--config", "binary.yaml"], "binary.yaml: not UTF-8 text"),
    "a deep configuration": (["--config=deep.yaml"], "nested more than 100 levels"),
    "a configuration of digits": (["-c", "digits.yaml"], "is no int"),
    "a pipe as configuration": (["-c", "pipe"], "a pipe or device, not a file"),
    "a directory as configuration": (["-c", "."], "a directory, not a file"),
    "devices that are a word": (["--devices", "abc"], "--devices must be a number from 1 to 1024"),
    "devices beyond all machines": (["--devices", "100000"], "--devices must be a number from 1 to 1024"),
    "a list of words": (["--devices", "0,x"], "--devices must be"),
    "a seed below 0": (["--seed_everything", "-1"], "--seed_everything must lie in 0 to 2**32 - 1, not -1"),
    "a seed beyond 32 bits": (["--seed_everything", "4294967296"], "--seed_everything must lie in 0 to"),
    "a batch of 1e30": (["--data.batch_size", "1e30"], "--data.batch_size must be a whole number"),
    "a batch of 30 digits": (["--data.batch_size", "9" * 30], "--data.batch_size must lie in 1 to 1048576"),
    "too many workers": (["--data.num_workers", "100000"], "--data.num_workers must lie in 0 to 1024"),
    "halvings without end": (["--model.search.halvings", "1000000000"], "--model.search.halvings must lie in 0 to 50"),
    "an output too long": (["-o", "x" * 300], "File name too long"),
    "brackets without end": (["--tasks", "[" * 10], "--tasks must be a list"),
}


@pytest.fixture
def command(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``test`` on the tiny suite in a directory of hostile files; gives the exit status."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    monkeypatch.chdir(tmp_path)
    return lambda *options: main(["test", "-s", str(tiny_suite), "-m", "Average", "-o", "out", *options])


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_one_line(command: Callable[..., int], capsys: pytest.CaptureFixture[str], case: str) -> None:
    options, message = CASES[case]
    assert command(*options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mergekit-vision: error: ")
    assert "Traceback" not in error
    assert "\x1b" not in error
    assert len(error.splitlines()) <= 2
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "merge"}, "SLURM_NTASKS is 4 without numbers in SLURM_PROCID"),
        ({"SLURM_NTASKS": "1"}, "SLURM_NTASKS is 1 without numbers in SLURM_PROCID"),
        ({"SLURM_NTASKS": "x"}, "SLURM_NTASKS is x"),
        *(
            ({name: value}, f"the environment variable {name} is {value!r}, but must be a whole number")
            for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "PL_GLOBAL_SEED")
            for value in ("abc", "", "-1", "9" * 30)
        ),
        (TORCHRUN, "torchrun started 3 processes, but --devices and --trainer.num_nodes are for 1"),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "many"}, "the environment variable WORLD_SIZE is 'many'"),
        ({CACHE_VARIABLE: "~nobody-of-this-name"}, f"{CACHE_VARIABLE}: ~nobody-of-this-name: no home directory"),
    ],
)
def test_variables_of_the_environment(
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command() == 1
    assert message in capsys.readouterr().err


def test_an_interactive_slurm_job_is_one_process(command: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert command() == 0


def terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@pytest.mark.parametrize("stage", ["merge", "test_step"])
def test_a_terminated_run_says_so_and_leaves_nothing(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(Average if stage == "merge" else MergedCLIP, stage, terminate)
    assert command() == 143
    assert "mergekit-vision: terminated" in capsys.readouterr().err
    assert not Path("out", "results.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("sent", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_that_a_library_swallows_is_no_fault(
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    sent: signal.Signals,
    word: str,
) -> None:
    def swallow(*_: object) -> None:
        try:
            os.kill(os.getpid(), sent)
            time.sleep(60)
        except BaseException as error:
            raise ValueError("could not determine the shape of an object") from error

    monkeypatch.setattr(Average, "merge", swallow)
    assert command() == 128 + sent
    assert capsys.readouterr().err.endswith(f"mergekit-vision: {word}; completed results are on disk, no file is partial\n")
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def leave(*_: object) -> None:
    sys.exit(0)


@pytest.mark.parametrize("stage", ["merge", "__init__"])
def test_a_method_cannot_end_the_program_as_if_all_were_well(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(Average, stage, leave)
    assert command() == 1
    assert "ended the run (SystemExit: 0)" in capsys.readouterr().err


def test_a_module_that_exits_while_it_is_imported(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    Path("leaving_module.py").write_text("raise SystemExit(0)")
    assert command("-m", "leaving_module.Method") == 1
    assert "cannot be imported: SystemExit: 0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_an_output_that_fails_loses_no_results(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
        stream = os.fdopen(writing, "w", buffering=1)
    else:
        stream = open("/dev/full", "w", buffering=1)  # noqa: SIM115, PTH123
    with stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        status = command()
    error = capsys.readouterr().err
    assert json.loads(Path("out", "results.json").read_text())["tasks"]
    if kind == "closed pipe":
        assert (status, error) == (0, "")
    else:
        assert status == 1
        assert error == f"mergekit-vision: error: standard output: {os.strerror(errno.ENOSPC)}; files are written all the same\n"


def test_names_that_are_no_text_and_names_that_act(
    command: Callable[..., int], tiny_suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(os.fsdecode(b"not utf-8 \xff \x1b[2J"))
    assert command("-o", str(place)) == 0
    printed = capsys.readouterr().out
    assert "not utf-8 \ufffd \ufffd[2J/results.json" in printed.replace("\n", "")
    assert json.loads((place / "results.json").read_text())["suite"] == "tiny"
    (place / "suite.yaml").write_text(tiny_suite.read_text())
    assert command("-s", str(place / "suite.yaml")) == 1
    error = capsys.readouterr().err
    assert "not utf-8 \ufffd \ufffd[2J/base" in error
    assert "\x1b" not in error


def test_a_suite_whose_file_is_no_text_is_merged(command: Callable[..., int], tiny_suite: Path) -> None:
    """Its name is that of the file."""
    suite = tiny_suite.with_name(os.fsdecode(b"su\xe9te.yaml"))
    suite.write_text(re.sub(r"^name:.*\n", "", tiny_suite.read_text(), flags=re.MULTILINE))
    try:
        assert main(["merge", "-s", str(suite), "-m", "Average", "-o", "out"]) == 0
    finally:
        suite.unlink()
    card = Path("out", "README.md").read_text(encoding="utf-8")
    assert "# su\ufffdte merged with Average" in card
    assert json.loads(Path("out", "merge.json").read_text())["suite"] == "su\udce9te"
    assert main(["push", "--merged", "out", "--repo", "org/merged", "--dry-run"]) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_what_the_machine_cannot_do_is_no_bug(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "results.json")

    monkeypatch.setattr(Average, "merge", fail)
    assert command() == 1
    assert capsys.readouterr().err == f"mergekit-vision: error: results.json: {os.strerror(number)}\n"
