"""Short names, and the nearest right name of a misspelled option."""

import sys
from pathlib import Path

import pytest

from mergekit_vision.cli.main import main
from mergekit_vision.cli.options import check_options, merger_names, method_first
from mergekit_vision.cli.short import SHORT, expanded, shortened
from mergekit_vision.errors import InputError

PROXIES = ["--data.proxies", "--data.proxies.n", "--data.proxies.seed"]
KNOWN = ["--suite", "--model", "--model.merger", "--model.scale", "--model.search.halvings", *PROXIES, "--trainer.logger"]


@pytest.mark.parametrize(
    ("typed", "full"),
    [
        (["-s", "demo", "-o", "out"], ["--suite", "demo", "--output", "out"]),
        (["-m", "ESMPP", "--merger.base", "TSVM"], ["--model.merger", "ESMPP", "--model.merger.base", "TSVM"]),
        (["--merger=ESM", "--merger.rank=8"], ["--model.merger=ESM", "--model.merger.rank=8"]),
        (["--proxies", "8", "--proxies.split", "train"], ["--data.proxies.n", "8", "--data.proxies.split", "train"]),
        (["--mergers", "[ESM]", "--merged", "x"], ["--mergers", "[ESM]", "--model.merged", "x"]),
        (["--model.scale", "1", "--images", "a.b"], ["--model.scale", "1", "--images", "a.b"]),
        (["--allow-code", "-s", "demo"], ["--data.allow_code=true", "--suite", "demo"]),
        (["--allow-code", "false"], ["--data.allow_code", "false"]),
        (["--merged", "x", "--no-verify"], ["--model.merged", "x", "--model.verify=false"]),
        ([], []),
    ],
)
def test_short_names_stand_for_full_ones(typed: list[str], full: list[str]) -> None:
    assert expanded(typed) == full


@pytest.mark.parametrize(
    ("full", "short"),
    [
        ("--model.scale is inf", "--scale is inf"),
        ("give one of --model.merger and --model.merged", "give one of --merger and --merged"),
        (
            "unknown option --model.merger.rnak (did you mean `--model.merger.rank`?)",
            "unknown option --merger.rnak (did you mean `--merger.rank`?)",
        ),
        ("--data.proxies.n and --data.proxies.split", "--proxies and --proxies.split"),
        ("--data.allow_code, --trainer.devices: x", "--allow-code, --devices: x"),
        ("merge again, or set --model.verify to false to use it", "merge again, or give --no-verify to use it"),
        ("merge again, or set --verify to false to use it", "merge again, or give --no-verify to use it"),
        ("--model.verify must be true or false", "--model.verify must be true or false"),
        ("--model.search.low, --data.batch_size, --to onnx", "--model.search.low, --data.batch_size, --to onnx"),
    ],
)
def test_messages_have_the_short_names(full: str, short: str) -> None:
    assert shortened(full) == short


@pytest.mark.parametrize(
    ("typed", "ordered"),
    [
        ("--model.merger.rank 8 --model.merger ESM", "--model.merger ESM --model.merger.rank 8"),
        ("--model.merger.rank=8 --config c --model.merger=ESM -o x", "--config c --model.merger=ESM --model.merger.rank=8 -o x"),
        (
            "--model.merger.base.rank 4 --model.merger.base TSVM --model.merger E",
            "--model.merger E --model.merger.base TSVM --model.merger.base.rank 4",
        ),
        ("--model.merger E --config c --model.merger.rank -1", "--model.merger E --config c --model.merger.rank -1"),
        ("--model.merger.help --suite demo --model.merger E", "--model.merger.help --suite demo --model.merger E"),
        ("--model.merger.r 1 --model.merger E --model.merger.r 1 x", "--model.merger E --model.merger.r 1 --model.merger.r 1 x"),
        ("--model.merger.rank --model.merger E", "--model.merger E --model.merger.rank"),
    ],
)
def test_a_method_goes_before_its_parameters(typed: str, ordered: str) -> None:
    assert method_first(typed.split()) == ordered.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.scael", "1"], r"unknown option --model\.scael \(did you mean `--model\.scale`\?\)$"),
        (["--model.search.halvngs", "1"], "did you mean `--model.search.halvings`"),
        (["--data.proxies.sed", "1"], "did you mean `--data.proxies.seed`"),
        (["--model.xyz", "1"], r"unknown option --model\.xyz$"),
        (["--bogus"], r"unknown option --bogus$"),
        (["--model.merger", "TSMV"], "Did you mean TSVM"),
        (["--model.merger", "ESM", "--model.merger.rnak", "4"], "did you mean `--model.merger.rank`.*ESM takes eigenvalue_power"),
        (["--model.merger", "ESMPP", "--model.merger.base", "ESM", "--model.merger.base.rnk", "4"], "merger.base.rank"),
        (["--model.merger", "Average", "--model.merger.rank", "4"], "Average takes no parameters"),
        (["--model.merger", "TIES", "--model.merger.rnak", "4"], r"unknown option --model\.merger\.rnak; TIES takes density"),
        (["--model.merger.rank", "4", "--config", "later.yaml"], "or --config FILE before --model.merger.rank"),
        (["--model.merger", "ESM", "--model.merger.rank"], r"--model\.merger\.rank needs a value"),
    ],
)
def test_what_is_misspelled_is_answered_with_the_nearest_name(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_options(arguments, KNOWN)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model.merger", "ESM", "--model.merger.rank", "4"],
        ["--model.merger", "mergekit_vision.plugins.esm.ESM", "--model.merger.rank=4"],
        ["--model.merger", "merger.yaml", "--model.merger.anything", "4"],
        ["--model.merger", "ESM", "--model.merger.init_args.rank", "4"],
        ["--model.merger.help", "ESM"],
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"],
    ],
)
def test_what_is_right_passes(arguments: list[str]) -> None:
    check_options(arguments, KNOWN)


@pytest.mark.parametrize("command", ["merge", "validate", "test", "predict", "compare"])
def test_help_begins_with_the_options_that_matter(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mergekit-vision {command} --suite SUITE.yaml [options]\n")
    assert text.index("options that matter:") < text.index("--model.search.low") < text.index("--trainer.accelerator")
    for short in SHORT:
        mine = not short.commands or command in short.commands
        line = next((line for line in text.splitlines() if short.text in line), "")
        assert (f" {short.names[-1]} {short.value} " in line) == mine, short
        assert not mine or f"{short.full} " in text, "each stands for an option that there is"


def test_short_names_run(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    options = ["--merger.density", "0.5", "-m", "TIES", "--scale", "0.7", "--tasks", "[stripes]", "-o", str(tmp_path / "out")]
    assert main(["test", "-s", str(tiny_suite), *options]) == 0
    text = (tmp_path / "out" / "results.json").read_text()
    assert '"density": 0.5' in text
    assert '"scale": 0.7' in text
    assert "grays" not in text.partition('"mean"')[0].partition('"tasks"')[2]


def test_a_tilde_is_the_home_directory_behind_an_equals_sign_too(
    tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no shell expands it."""
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    suite = ["-s", str(tiny_suite)]
    assert main(["merge", *suite, "-m", "Average", "--output=~/merged"]) == 0
    assert main(["test", *suite, "--merged=~/merged", "--output=~/measured"]) == 0
    assert main(["export", "--merged=~/merged", "--to=open_clip", "--output=~/exported"]) == 0
    push = ["push", "--merged=~/merged", "--repo=org/merged", "--dry-run"]
    assert main([*push, "--results=~/measured/results.json"]) == 0
    assert {place.name for place in (tmp_path / "home").iterdir()} >= {"merged", "measured", "exported"}
    assert list((tmp_path / "work").iterdir()) == []
    assert main([*push, "--results=~no-such-user/x"]) == 1
    assert "--results: ~no-such-user: no home directory of such a user is known" in capsys.readouterr().err


def test_mergers_named_anywhere_are_found(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {merger: {class_path: a.Outer, init_args: {base: {class_path: b.Inner, init_args: {rank: 4}}}}}")
    assert merger_names(["--config", str(config)]) == ["a.Outer", "b.Inner"]
    assert merger_names(["-c", str(config), "--mergers", "[TIES, c.Mine]"]) == ["a.Outer", "b.Inner", "TIES", "c.Mine"]
    config.write_text("model: {merger: d.Short}")
    assert merger_names([f"--config={config}", "--config", "nowhere.yaml"]) == ["d.Short"]
