"""Command lines with a wrong value in each place: one message, status 1, and nothing that was not there before.

A row is the beginning of a command line, the option that comes last, its values, and what the message says of each. The first
value of a row is tried in every run of the tests.
"""

import os
import sys
from pathlib import Path

import pytest
from pictures import image
from small_models import DYNAMIC, STATIC, small_models

from mergekit_vision.cli.main import main

MERGE, TEST, COMPARE = (f"{command} -s suite/suite.yaml -o out" for command in ("merge", "test", "compare"))
ESM, TSVM, AVERAGE = f"{MERGE} -m ESM", f"{MERGE} -m TSVM", f"{TEST} -m Average"
TUNE, PLAN = "tune -s suite/suite.yaml -o out --proxies 4 -m TSVM", "plan -s suite/suite.yaml"
SEARCH = f"{MERGE} -m Average --scale search"
PREDICT = "predict -s suite/suite.yaml --merged static -o out"
EXPORT, PUSH, INSPECT = (
    "export --merged static -o out",
    "push --merged static --dry-run",
    "inspect suite/experts/colors.safetensors",
)
NO_MODELS = ["", "missing", "file", "pipe", "photos", "loop", "suite/base", "/dev/null", "hf-hub:a/b"]
NO_PLACES = ["file", "file/x", "pipe", "/dev/full", "nowhere", "loop", "loop/x", "a\0b", "x" * 300, "/" + "y/" * 3000]
NO_NUMBERS = ["x", "1.5", "1e30", "nan", "[1]", "{}"]

ROWS: list[tuple[str, str, list[str], str]] = [
    ("", "", ["tets", "--verison", "a\0b", "\x1b[2J", "-s"], "not a command"),
    ("", "", ["merge", "test", "validate", "predict", "compare"], "--suite is missing"),
    ("", "", ["export", "push", "inspect"], "arguments are required"),
    ("methods", "", ["x", "--jsn"], "unrecognized arguments"),
    (MERGE, "--frob", ["3"], "unknown option --frob"),
    (MERGE, "-m", ["NoSuch", "os", "null", "x" * 300], "there is no merger"),
    (MERGE, "-m", ["os.system", "subprocess.Popen", "torch.nn.Linear"], "is not a subclass of"),
    (MERGE, "-m", ["a.b.c", "é.b", "TIES.", "mergekit_vision.plugins.ties.TIES.x"], "cannot be imported"),
    (MERGE, "-m", ["", "...", "3", "[TIES]", "{class_path: os.system}", "{class_path: TIES, init_args: 3}"], "--merger"),
    (TSVM, "--merger.rank", NO_NUMBERS, "--merger.rank must be a whole number"),
    (TSVM, "--merger.rank", ["-1", "0"], "must be a whole number, 1 or more"),
    (
        AVERAGE,
        "--scale",
        ["abc", "nan", "inf", "", "[1]", "{}", "true"],
        "--scale must be a number or one of merger, search",
    ),
    (AVERAGE, "--scale", ["1e400", "1e30"], "must be a finite number, of magnitude 65504 at most"),
    (ESM, "--proxies", NO_NUMBERS, "--proxies must be a whole number"),
    (ESM, "--proxies", ["0", "-1"], "--proxies must be 1 or more"),
    (ESM, "--proxies.split", ["nosuch", ""], "proxies.split: no task has a split"),
    (AVERAGE, "--experts", ["[]", "[nosuch]"], "name some of the suite's tasks"),
    (AVERAGE, "--experts", ["nosuch", "3", "{}", "[3]", "[[colors]]", ""], "--experts must be"),
    (AVERAGE, "--tasks", ["[]", "[nosuch]", "[color]"], "--tasks: not in the suite"),
    (AVERAGE, "--tasks", ["nosuch", "3", "{}", "[3]", ""], "--tasks must be"),
    (AVERAGE, "--experts", ["[colors, colors]", "[grays, colors, grays]"], "is named twice; no expert can be merged with itself"),
    (AVERAGE, "--tasks", ["[colors, colors]"], "--tasks: colors is named twice"),
    (AVERAGE, "--route", ["nosuch", "", "3", "[router]"], "--route must be one of"),
    (AVERAGE, "--devices", ["-5", "1.5", "[]", "null", "x"], "--devices must be a number"),
    (f"{AVERAGE} --trainer.accelerator cpu", "--devices", ["-1", "[0, 0]", "[99]"], "the CPU takes a number of processes"),
    (AVERAGE, "--precision", ["17", "", "int8", "[32]"], "--precision must be one of"),
    (AVERAGE, "--data.batch_size", ["0", "-1", *NO_NUMBERS], "--data.batch_size must"),
    (AVERAGE, "--data.num_workers", ["-1", *NO_NUMBERS], "--data.num_workers must"),
    (SEARCH, "--model.search.high", ["nan", "x"], "--model.search.high must be a number"),
    (SEARCH, "--model.search.halvings", ["-1", "51", *NO_NUMBERS], "--model.search.halvings must"),
    (AVERAGE, "--trainer.accelerator", ["abc"], "invalid accelerator"),
    (AVERAGE, "--trainer.strategy", ["abc"], "invalid strategy"),
    (AVERAGE, "--trainer.num_nodes", ["0", "x"], "num_nodes"),
    (f"{MERGE} -m Average", "-o", NO_PLACES, "--output "),
    (AVERAGE, "-o", ["", "directories", *NO_PLACES], "--output "),
    (f"{PREDICT} --task colors --images photos", "-o", ["", "directories", *NO_PLACES], "--output "),
    (COMPARE, "-o", ["", "directories", *NO_PLACES], "--output "),
    ("export --merged static --to open_clip", "-o", ["photos", "suite", ".", *NO_PLACES], "--output"),
    (TEST, "--merged", [""], "--merged is empty; name the directory of a merged model"),
    (TEST, "--merged", NO_MODELS[1:], "not a merged model ("),
    (f"{PREDICT} --task colors --images photos", "--merged", NO_MODELS[1:], "not a merged model"),
    ("export --to onnx -o out", "--merged", NO_MODELS[1:], "not a merged model"),
    ("push --repo a/b --dry-run", "--merged", NO_MODELS[1:], "not a merged model"),
    (TEST, "--merged", ["x" * 300], "File name too long"),
    (TEST, "--merged", ["a\0b"], "holds a NUL character"),
    ("push --repo a/b --dry-run", "--merged", ["a\0b"], "holds a NUL character"),
    ("push --repo a/b --dry-run", "--merged", ["x" * 300], "File name too long"),
    (TEST, "--merged", ["dynamic"], "has 3 experts, but the record names 2; merge again"),
    (AVERAGE, "--merged", ["static"], "give one of --merger"),
    (MERGE, "--merged", ["static"], "merge needs --merger"),
    (f"{TEST} --merged static", "--scale", ["1"], "--scale goes with --merger"),
    (f"{TEST} --merged static", "--route", ["oracle", "base"], "a static model has no routed experts"),
    (EXPORT, "--to", ["", "nosuch", "ONNX", "onnx "], "invalid choice"),
    ("export --merged dynamic -o out", "--to", ["huggingface", "open_clip"], "this format has no room for its routed experts"),
    (f"{EXPORT} --to torch", "--device", ["", "nosuch", "cpu:x", "meta", "\0", "hpu"], "--device "),
    (
        PUSH,
        "--repo",
        ["", "a", "a/b/c", "a b/c", "../..", "a/..", "/", "a/b\0", "é/b", "a/-b", "a/b.git", "x" * 200 + "/y"],
        "--repo ",
    ),
    (f"{PUSH} --repo a/b", "--results", ["missing", "photos", "pipe", "/dev/zero", "loop"], "missing, or no file"),
    (f"{PUSH} --repo a/b", "--results", ["file", "empty"], "not valid JSON"),
    (f"{PUSH} --repo a/b", "--results", ["list.json"], "list.json: the file: must be a mapping with the keys kind, not"),
    (f"{PUSH} --repo a/b", "--results", ["kind.json"], "kind.json: kind: must be 'evaluation', not the int 3; name the file"),
    ("add -s suite/suite.yaml -o out --experts [colors]", "--merged", NO_MODELS[1:], "not a merged model"),
    ("add -s suite/suite.yaml -o out --merged static --experts [stripes]", "--scale", ["1e30"], "must be a finite number"),
    ("drop -s suite/suite.yaml -o out --merged static", "--experts", ["nosuch", "3", "{}", ""], "--experts must be"),
    (f"{MERGE} -m ESM", "--keep-state", ["-1", "3", "1.5", "x"], "--keep-state"),
    (f"{PREDICT} --images photos", "--task", ["nosuch", "", "color", "\x1b[2J"], "not in the suite"),
    (f"{PREDICT} --task colors", "--images", ["missing", "loop", "a\0b"], "no such file or directory"),
    (f"{PREDICT} --task colors", "--images", ["suite/base", "file", "pipe", "/dev/zero", "empty"], "holds no image files"),
    (f"{PREDICT} --task colors", "--images", ["damaged", "damaged/a.png"], "a.png: not a readable image"),
    (f"{PREDICT} --task colors --images photos", "--top", ["0", "-1"], "at least one class"),
    (f"{PREDICT} --task colors --images photos", "--top", ["x", "1.5", "1e30"], "--top must be a whole number"),
    (COMPARE, "--mergers", ["[]", ""], "name at least one method"),
    (COMPARE, "--mergers", ["[NoSuch]", "3", "{}", "[3]", "[null]", "all,"], "there is no merger"),
    (COMPARE, "--mergers", ["[os.system]", "[Average, subprocess.Popen]"], "is not a subclass of"),
    (COMPARE, "--variants", [""], "--variants is empty; name a file"),
    (COMPARE, "--variants", ["pipe", "/dev/zero", "photos", "suite"], "not a file"),
    (TUNE, "--grid", ["{rank: &a [*a]}"], "aliases stand for more than"),
    (TUNE, "--grid", ["{rank: [1], rank: [2]}"], "--grid: not valid YAML: line 1: key 'rank' is given twice"),
    (TUNE, "--grid", ["{1: [1]}", "{null: [1]}"], "is no parameter's name"),
    (TUNE, "--grid", ["", "[]", "x", "{rank: 3}", "{rank: [4]"], "--grid must be"),
    (PLAN, "--mergers", ["", "[]"], "name at least one method"),
    (PLAN, "--mergers", ["[", ","], "--mergers: not valid YAML"),
    (PLAN, "--mergers", ["[NoSuch]", "3", "{a: 1}", "[3]", "[null]"], "there is no merger"),
    (PLAN, "--mergers", ["[os.system]", "subprocess.Popen"], "is not a subclass of"),
    (PLAN, "-o", ["", " "], "is empty; name a file or directory"),
    (PLAN, "-o", ["directories/plan", *NO_PLACES[:6]], "--output "),
    (PLAN, "--batch-size", ["0", "-3"], "--batch-size must be 1 or more"),
    ("fetch -s suite/suite.yaml", "--tasks", ["", "[]", ","], "--tasks names none"),
    ("fetch -s suite/suite.yaml", "--tasks", ["nosuch", "Colors", "colors,nosuch"], "--tasks: not in the suite"),
    ("export --to onnx -o out", "--merged", [""], "--merged: is empty"),
    ("push --repo a/b --dry-run", "--merged", [""], "--merged: is empty"),
    ("inspect", "", ["dynamic"], "dynamic: a dynamic merged model, of which this would be the static base alone"),
    ("inspect", "", ["missing", "loop"], "cannot be read"),
    ("inspect", "", ["pipe", "/dev/zero"], "not a file of weights"),
    ("inspect", "", ["file", "empty", "suite/suite.yaml", "suite/data/colors/val.parquet"], "neither safetensors nor"),
    ("inspect", "", ["hf-hub:", "hf-hub:a", "hf-hub:a/b@"], "must be hf-hub:org/name"),
    (INSPECT, "--kind", ["x", ""], "invalid choice"),
    (INSPECT, "--scale", ["x", "", "nan", "inf"], "but must be a finite number"),
    (INSPECT, "--suite", ["missing", "pipe", "suite"], "suite"),
]
CASES = [
    pytest.param(arguments, said, id=" ".join(arguments)[:90], marks=[pytest.mark.slow] if number else [])
    for start, option, values, said in ROWS
    for number, value in enumerate(values)
    for arguments in [[*start.split(), *([option] if option else []), value]]
]


@pytest.fixture(scope="module")
def place(tiny_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a suite, two merged models, and what should not be named."""
    place = tmp_path_factory.mktemp("place")
    (place / "suite").symlink_to(tiny_suite.parent)
    save = small_models(tiny_suite)
    save(place / "static", STATIC)
    save(place / "dynamic", DYNAMIC)
    for name in ("photos", "damaged", "directories/results.json", "directories/plan/plan.json"):
        (place / name).mkdir(parents=True)
    image(1).save(place / "photos" / "a.png")
    for name, content in {"file": "x", "empty": "", "damaged/a.png": "x", "list.json": "[]", "kind.json": '{"kind": 3}'}.items():
        (place / name).write_text(content)
    (place / "loop").symlink_to("loop")
    (place / "nowhere").symlink_to("gone")
    os.mkfifo(place / "pipe")
    return place


def names_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


@pytest.mark.parametrize(("arguments", "said"), CASES)
def test_a_wrong_value_is_one_message_and_leaves_nothing(
    place: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    before = names_in(place)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    lines = error[error.index("mergekit-vision: error: ") :].splitlines()
    assert said in error
    assert len(lines) <= 4
    assert "Traceback" not in error
    assert "this is a bug" not in error
    assert not {"\x1b", "\0"} & set(error)
    assert names_in(place) == before
