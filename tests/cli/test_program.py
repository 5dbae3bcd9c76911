"""The command line as a user runs it, on a tiny suite: merge, evaluate, predict, configuration, mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from PIL import Image

import mergekit_vision
from mergekit_vision.cli.main import main
from mergekit_vision.suites.suite import Suite

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def command(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run one command on the tiny suite in this process; gives the exit status."""
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    monkeypatch.chdir(tmp_path)

    def run(name: str, *options: str) -> int:
        return main([name, "--suite", str(tiny_suite), *options])

    return run


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("merger", ["Average", "TaskArithmetic", "TIES", "TSVM", "ESM"])
def test_merge_then_evaluate_the_merged_directory(command, tmp_path: Path, merger: str) -> None:
    assert command("test", "--model.merger", merger, "--output", "direct") == 0
    assert command("merge", "--model.merger", merger, "--output", "merged") == 0
    assert command("test", "--model.merged", "merged", "--output", "again") == 0
    direct, again = results(tmp_path / "direct"), results(tmp_path / "again")
    assert direct["tasks"] == again["tasks"]
    assert direct["merger"] == again["merger"]
    assert direct["merger"]["name"] == merger


def test_open_clip_loads_the_merged_directory(command, tmp_path: Path) -> None:
    assert command("merge", "--model.merger", "TSVM", "--output", "merged") == 0
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'merged'}")
    ours = mergekit_vision.load(tmp_path / "merged")
    images = torch.stack([preprocess(Image.effect_noise((20, 20), 90).convert("RGB")) for _ in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), model.eval().encode_image(images), rtol=1e-5, atol=1e-5)
        assert ours.encode_image(images, normalize=True).norm(dim=-1).allclose(torch.ones(3))
    assert {"README.md", "config.yaml", "merge.json"} <= {path.name for path in (tmp_path / "merged").iterdir()}


def test_a_changed_merged_model_is_evaluated_only_unverified(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("merge", "-m", "TaskArithmetic", "-o", "merged") == 0
    record = tmp_path / "merged" / "merge.json"
    record.write_text(record.read_text() + "\n")
    assert command("validate", "--merged", "merged", "-o", "out") == 1
    assert "merge.json was changed after it was written; merge again, or give --no-verify" in capsys.readouterr().err
    assert command("validate", "--merged", "merged", "-o", "out", "--no-verify") == 0


@pytest.mark.skipif(os.name != "posix", reason="there is no such limit")
def test_a_merge_that_may_write_no_large_file_says_so_in_one_line(tiny_suite: Path, tmp_path: Path) -> None:
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    script = f"{limited} from mergekit_vision.cli.main import main; raise SystemExit(main())"
    options = ["merge", "-s", str(tiny_suite), "-m", "TaskArithmetic", "-o", str(tmp_path / "merged")]
    ended = subprocess.run([sys.executable, "-c", script, *options], capture_output=True, text=True, check=False)
    (line,) = [line for line in ended.stderr.splitlines() if "error" in line]
    assert line.startswith(f"mergekit-vision: error: --output {tmp_path}/merged: the model cannot be written (")
    assert ended.returncode == 1
    assert not (tmp_path / "merged").exists()


def test_results_say_what_was_run(command, tmp_path: Path, tiny_suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command("test", "--model.merger", "TIES", "--model.merger.density", "0.5", "--model.scale", "0.7", "--output", "out") == 0
    )
    found = results(tmp_path / "out")
    assert found["merger"]["init_args"]["density"] == 0.5
    assert found["scale"] == 0.7
    assert set(found["tasks"]) == set(Suite.load(tiny_suite).tasks)
    for row in found["tasks"].values():
        assert row["accuracy"] * row["n"] == pytest.approx(round(row["accuracy"] * row["n"]))
    accuracies = [row["accuracy"] for row in found["tasks"].values()]
    assert found["mean"]["accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))
    assert found["seconds"].keys() >= {"merge", "eval"}
    printed = capsys.readouterr().out
    assert "mean" in printed
    assert all(task in printed for task in found["tasks"])


def test_one_expert_at_coefficient_one_is_that_expert(command, tmp_path: Path, tiny_suite: Path) -> None:
    task = next(iter(Suite.load(tiny_suite).tasks))
    options = ("--model.merger", "TaskArithmetic", "--model.scale", "1", "--model.experts", f"[{task}]")
    assert command("test", *options, "--output", "one") == 0
    assert results(tmp_path / "one")["tasks"][task]["normalized"] == 1.0


def test_search_logs_every_coefficient_and_takes_the_best(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("validate", "--model.merger", "TaskArithmetic", "--model.scale", "search", "--output", "out") == 0
    found = results(tmp_path / "out")
    best = max(found["search"], key=lambda row: row["normalized"])
    assert found["scale"] in [row["coefficient"] for row in found["search"] if row["normalized"] == best["normalized"]]
    assert found["mean"]["normalized"] == pytest.approx(best["normalized"])
    printed = capsys.readouterr().out
    assert all(f"coefficient {row['coefficient']:.4g}:" in printed for row in found["search"])


def test_saved_configuration_runs_again(command, tmp_path: Path) -> None:
    assert command("test", "--model.merger", "TIES", "--model.merger.density", "0.3", "--output", "first") == 0
    config = tmp_path / "first" / "config.yaml"
    assert main(["test", "--config", str(config), "--output", "second"]) == 0
    first, second = results(tmp_path / "first"), results(tmp_path / "second")
    assert first["tasks"] == second["tasks"]
    assert first["merger"] == second["merger"]


def test_printed_configuration_is_complete(command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("test", "--model.merger", "ESM", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["merger"]["class_path"].endswith("ESM")
    assert printed["model"]["merger"]["init_args"]["eigenvalue_power"] == 0.15
    assert printed["data"]["proxies"]["n"] == 32


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_run(command, config: Path) -> None:
    assert command("test", "--config", str(config), "--output", "out") == 0


def test_predict_writes_the_most_probable_classes(command, tmp_path: Path, tiny_suite: Path) -> None:
    (tmp_path / "photos").mkdir()
    for index in range(3):
        Image.effect_noise((24, 24), 30 * index + 1).save(tmp_path / "photos" / f"{index}.png")
    task = list(Suite.load(tiny_suite).tasks.values())[1]
    options = ("--model.merger", "Average", "--task", task.name, "--images", "photos", "--top", "2")
    assert command("predict", *options, "--output", "out") == 0
    rows = [line.split(",") for line in (tmp_path / "out" / "predictions.csv").read_text().splitlines()]
    assert rows[0] == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert [Path(row[0]).name for row in rows[1:]] == ["0.png", "1.png", "2.png"]
    for row in rows[1:]:
        assert {row[1], row[3]} <= set(task.classes)
        assert float(row[2]) >= float(row[4])


PLUGIN = """
from mergekit_vision.merger import Merged, MergeInputs, Merger

class Half(Merger):
    def __init__(self, gain: float = 0.5) -> None:
        self.gain = gain

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({key: self.gain * inputs.deltas(key).sum(0) for key in inputs.base})
"""


@pytest.fixture
def foreign_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a user's own with one merger, and an installed distribution that registers it."""
    (tmp_path / "site" / "their_package").mkdir(parents=True)
    (tmp_path / "site" / "their_package" / "__init__.py").write_text(PLUGIN)
    info = tmp_path / "site" / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mergekit_vision.mergers]\nHalf = their_package:Half\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return tmp_path / "site"


@pytest.mark.usefixtures("foreign_package")
def test_a_plugin_of_another_package(tiny_suite: Path, tmp_path: Path) -> None:
    names = ("Half", "their_package.Half")
    commands = [
        ["test", "-s", str(tiny_suite), "-m", name, "--merger.gain", "0.25", "-o", str(tmp_path / name)] for name in names
    ]
    script = f"from mergekit_vision.cli.main import main; raise SystemExit(max(map(main, {commands})))"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name in names:
        found = results(tmp_path / name)
        assert found["merger"]["class_path"] == "their_package.Half"
        assert found["merger"]["init_args"] == {"gain": 0.25}


def test_one_photo_on_two_processes(tiny_suite: Path, tmp_path: Path) -> None:
    Image.effect_noise((24, 24), 60).save(tmp_path / "photo.png")
    options = [
        "--suite",
        str(tiny_suite),
        "--model.merger",
        "Average",
        "--task",
        "grays",
        "--images",
        str(tmp_path / "photo.png"),
    ]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    run_apart("predict", *options, "--output", str(tmp_path / "out"))
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 2


def run_apart(*arguments: str) -> str:
    """Run the command in a process of its own; gives what it printed."""
    process = subprocess.run(
        [sys.executable, "-m", "mergekit_vision", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_two_processes_count_what_one_counts(tiny_suite: Path, tmp_path: Path) -> None:
    common = [
        "--suite",
        str(tiny_suite),
        "--model.merger",
        "ESMPP",
        "--model.merger.rank",
        "4",
        "--model.scale",
        "search",
        "--data.batch_size",
        "4",
    ]
    common += ["--trainer.accelerator", "cpu"]
    run_apart("test", *common, "--output", str(tmp_path / "one"), "--trainer.devices", "1")
    printed = run_apart("test", *common, "--output", str(tmp_path / "two"), "--trainer.devices", "2")
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert any(row["n"] % 2 for row in one["tasks"].values()), "an odd number of images is what this is about"
    assert one["tasks"] == two["tasks"]
    assert one["search"] == two["search"]
    assert one["routing"] == two["routing"]
    assert printed.count("on test →") == 1, "only the first process reports"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "x.yaml", "merge"], "options come after the command"),
        (["frobnicate"], "the commands are merge"),
        (["test"], "--suite is missing"),
        (["test", "--suite", "nowhere.yaml", "--model.merger", "TSVM"], "nowhere.yaml: cannot be read"),
        (["test", "--suite", "SUITE"], "give one of --merger"),
        (["test", "--suite", "SUITE", "--model.merger", "TSMV"], "Did you mean TSVM"),
        (["test", "--suite", "SUITE", "--model.merger", "nowhere.Method"], "nowhere"),
        (["test", "--suite", "SUITE", "--model.merger", "TIES", "--model.merger.density", "2"], "density is 2"),
        (["test", "--suite", "SUITE", "--model.merger", "TIES", "--model.merger.densty", "2"], "densty"),
        (["test", "--suite", "SUITE", "--model.merger", "TIES", "--model.scale", "serch"], "--scale must be"),
        (["test", "--suite", "SUITE", "--model.merger", "TIES", "--model.experts", "[moon]"], "moon"),
        (["test", "--suite", "SUITE", "--model.merged", "nowhere"], "not a merged model"),
        (["test", "--suite", "SUITE", "--model.merger", "ESM", "--data.proxies.n", "0"], "--proxies must be"),
        (["test", "--suite", "SUITE", "--model.merger", "TIES", "--trainer.accelerator", "gpu", "--trainer.devices", "99"], ""),
        (["test", "--suite", "SUITE", "--model.merger", "TIES", "--model.scale", ".inf"], "finite"),
        (["test", "--suite", "SUITE", "--model.merger", "ESM", "--data.proxies.split", "vall"], "vall"),
        (["merge", "--suite", "SUITE", "--model.merged", "."], "merge needs --merger"),
        (["predict", "--suite", "SUITE", "--model.merger", "TIES", "--task", "moon", "--images", "."], "--task moon"),
        (["test", "--suite", "SUITE", "--bogus", "1"], "--bogus"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback(
    arguments: list[str], message: str, tiny_suite: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    assert main([str(tiny_suite) if word == "SUITE" else word for word in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mergekit-vision: error: ")
    assert "Traceback" not in error


def test_a_failed_merge_leaves_the_model_before_it_alone(command, tmp_path: Path, tiny_suite: Path) -> None:
    assert command("merge", "--model.merger", "Average", "--output", "merged") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    assert command("merge", "--model.merger", "TIES", "--model.experts", "[moon]", "--output", "merged") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before
    assert command("merge", "--model.merger", "TIES", "--model.experts", "[moon]", "--output", "nothing") == 1
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("place", ["a_file", "a_file/below"])
def test_output_that_is_a_file(command, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a_file").write_text("mine")
    for name in ("test", "merge"):
        assert command(name, "--model.merger", "Average", "--output", place) == 1
        assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "a_file").read_text() == "mine"


def test_merging_never_overwrites_somebody_elses_model(command, tiny_suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = Path(Suite.load(tiny_suite).backbone.removeprefix("local-dir:"))
    before = {path.name: path.read_bytes() for path in backbone.iterdir()}
    assert command("merge", "--model.merger", "Average", "--output", str(backbone)) == 1
    assert "not written here" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in backbone.iterdir()} == before


def test_a_merged_model_is_evaluated_without_its_experts(
    command, tmp_path: Path, tiny_suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("merge", "--model.merger", "Average", "--output", "merged") == 0
    content = yaml.safe_load(tiny_suite.read_text())
    for name, task in content["tasks"].items():
        task["expert"] = f"gone/{name}.safetensors"
    alone = tiny_suite.with_name("alone.yaml")
    alone.write_text(yaml.safe_dump(content))
    assert main(["test", "--suite", str(alone), "--model.merged", "merged", "--output", "out"]) == 0
    found = results(tmp_path / "out")
    assert found["mean"]["normalized"] is None
    assert found["mean"]["accuracy"] > 0
    assert main(["test", "--suite", str(alone), "--model.merger", "Average"]) == 1
    assert "gone" in capsys.readouterr().err


def test_help_and_version_need_nothing_heavy() -> None:
    script = "import sys; from mergekit_vision.cli.main import main; main([sys.argv[1]]); print('torch' in sys.modules)"
    for option, expected in (("--help", "usage: mergekit-vision COMMAND"), ("--version", mergekit_vision.__version__)):
        printed = subprocess.run([sys.executable, "-c", script, option], capture_output=True, text=True, check=True).stdout
        assert expected in printed
        assert printed.endswith("False\n")
