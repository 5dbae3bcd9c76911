"""The benchmark of merging runs end to end, and both its sides compute the same models."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tolerances import eps

ROOT = Path(__file__).parent.parent
TASKS = 8
CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
}
ERROR, UPDATE_ERROR = 8 * eps(), 800 * eps()
"""Of weights, which round a few times; and of the merged task vector, a hundred times smaller than they are."""


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, importable wherever pytest was started."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.merging")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a tiny tower that open_clip can make."""
    place = tmp_path_factory.mktemp("models") / "tiny"
    place.mkdir()
    (place / "open_clip_config.json").write_text(json.dumps(CONFIG))
    return f"local-dir:{place}"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.mark.parametrize("method", ["ESM", "TSVM", "TIES", "IsoC"])
def test_ours_is_the_textbook_in_float64(merging: ModuleType, model: str, workdir: Path, method: str) -> None:
    files = merging.prepare(workdir, model, None, TASKS, proxies=8)
    case = merging.Case.of(files, model=model, layers=3, method=method, implementation="ours")
    exact = merging.replace(case, implementation="textbook", double=True)
    figures = [merging.work(one.to_json()) for one in (case, exact)]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["peak_MiB"] >= row["idle_MiB"] > 0 for row in figures)
    assert all((row["forward_seconds"] > 0) == (method == "ESM") for row in figures)
    found = merging.errors(case, exact.output)
    assert 0 < found["error"] < ERROR
    assert 0 < found["update_error"] < UPDATE_ERROR
    # the comparison sees a model that is off
    case.output.write_bytes(files.base.read_bytes())
    assert merging.errors(case, exact.output)["update_error"] == pytest.approx(1)


def test_runs_end_to_end(
    merging: ModuleType,
    model: str,
    workdir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("benchmarks.machine.RESULTS", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--models", model, "--tasks", str(TASKS), "--methods", "ESM", "--proxies", "8", "--layers", "1"]
    merging.main([*command, "--workdir", str(workdir), "--check", "float32", "--draw"])
    written = json.loads((tmp_path / "merging-cpu.json").read_text())
    textbook, ours = written["rows"]
    assert (textbook["implementation"], ours["implementation"]) == ("textbook", "ours")
    assert ours["layers"] == 1
    assert ours["of_layers"] == 3
    assert ours["speedup"] == pytest.approx(textbook["seconds"] / ours["seconds"], abs=0.01)
    assert ours["update_error"] < UPDATE_ERROR
    assert (tmp_path / "merging-cpu.png").stat().st_size > 0
    assert "CUT TO 1 of 3 blocks" in capsys.readouterr().out
    assert not list((workdir / "tiny-1-blocks").glob("*-ours-float32*")), "measured models are left behind"


def test_experts_are_made_once_and_do_not_depend_on_how_many_there_are(merging: ModuleType, model: str, workdir: Path) -> None:
    two = merging.prepare(workdir / "few", model, 1, 2, proxies=2)
    made = [path.stat().st_mtime_ns for path in two.experts]
    three = merging.prepare(workdir / "few", model, 1, 3, proxies=2)
    assert [path.stat().st_mtime_ns for path in three.experts[:2]] == made
    other = merging.prepare(workdir / "other", model, 2, 1, proxies=2)
    with safe_open(three.experts[0], "pt") as a, safe_open(other.experts[0], "pt") as b, safe_open(three.base, "pt") as base:
        assert set(a.keys()) < set(b.keys())
        for key in a.keys():  # noqa: SIM118 (not a dict)
            assert torch.equal(a.get_tensor(key), b.get_tensor(key))
            assert not torch.equal(a.get_tensor(key), base.get_tensor(key))


def test_a_run_that_dies_is_reported(merging: ModuleType, model: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")  # the command that fails
    files = merging.prepare(workdir, model, 1, 2, proxies=2)
    cases = [merging.Case.of(files, model=model, layers=1, method="TSVM", implementation=name) for name in ("ours", "textbook")]
    textbook, ours = merging.compare(cases, repeats=2, check="float64")
    assert textbook == {"method": "TSVM", "implementation": "textbook", "failed": "nothing on standard error (exit status 1)"}
    assert ours["failed"] == textbook["failed"]


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, importable wherever pytest was started, its results beside the test."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("benchmarks.machine.RESULTS", tmp_path / "results")
    return importlib.import_module("benchmarks.evaluation")


EVALUATION = ["--images", "12", "--batches", "8", "--workers", "0", "--seconds", "0"]


def test_evaluation_counts_every_image_and_agrees_with_the_bare_loop(evaluation: ModuleType, model: str, tmp_path: Path) -> None:
    evaluation.main(["--workdir", str(tmp_path), "--model", model, *EVALUATION])
    rows = json.loads((tmp_path / "results" / "evaluation-cpu.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["bare loop", "test", "test, decoding, 0 workers"]
    assert all(row["images"] == 24 and row["rounds"] == 3 and row["images_per_second"] > 0 for row in rows)
    assert (rows[0]["throughput_ratio"], rows[0]["cpu_ratio"]) == (1, 1)
    assert all(row["throughput_ratio"] > 0 for row in rows)


def test_evaluation_refuses_sides_that_disagree(
    evaluation: ModuleType, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = evaluation.Case.bare

    def wrong(case: Any) -> tuple[Any, dict[str, float]]:
        cost, accuracies = bare(case)
        return cost, {task: value + 1 / 12 for task, value in accuracies.items()}

    monkeypatch.setattr(evaluation.Case, "bare", wrong)
    with pytest.raises(RuntimeError, match="test and the bare loop disagree"):
        evaluation.main(["--workdir", str(tmp_path), "--model", model, *EVALUATION])
    assert not (tmp_path / "results").exists()


def test_reading_measures_every_kind_of_file_and_refuses_images_that_differ(
    evaluation: ModuleType, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = importlib.import_module("benchmarks.reading")
    command = ["--workdir", str(tmp_path), "--model", model, "--images", "6", "--batch", "4", "--rounds", "1"]
    reading.main(command)
    *rows, forward = json.loads((tmp_path / "results" / "reading-cpu.json").read_text())["rows"]
    assert [row["images"] for row in (*rows, forward)] == [6] * 7
    assert all(row["images_per_cpu_second"] > 0 and 0 < row["share"] < 1 for row in rows)
    assert [row["cpu_ratio"] for row in rows if "bare loop" in row["variant"]] == [1, 1]
    assert "share" not in forward
    ours = reading.ours
    other = {"folder": str(reading.photos(tmp_path / "other", 6, seed=1))}
    monkeypatch.setattr(reading, "ours", lambda config, *rest: ours(other, *rest) if "parquet" in config else ours(config, *rest))
    with pytest.raises(RuntimeError, match="PNG in Parquet and the bare loop disagree"):
        reading.main(command)


def test_dynamic_encoders_take_turns_with_the_plain_one(evaluation: ModuleType, model: str, tmp_path: Path) -> None:
    routing = importlib.import_module("benchmarks.routing")
    routing.main(["--models", model, "--tasks", "3", "--batches", "2", "--seconds", "0"])
    plain, *rows = json.loads((tmp_path / "results" / "routing-cpu.json").read_text())["rows"]
    assert (plain["variant"], plain["time_ratio"], plain["cpu_ratio"], plain["added_MiB"]) == ("plain encoder", 1, 1, 0)
    assert [row["variant"] for row in rows] == [*routing.VARIANTS, "all 3 experts"]
    assert all(row["cpu_ratio"] > 0 and row["added_MiB"] > 0 for row in rows)


@pytest.mark.slow
def test_dynamic_models_beside_their_adapters(tiny_suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    adapters = importlib.import_module("benchmarks.adapters")
    adapters.main([str(tiny_suite), "--methods", "SMILE"])
    row = next(line for line in capsys.readouterr().out.splitlines() if "SMILE" in line)
    base, merged, once, true = (float(cell) for cell in row.replace("│", " ").split()[1:])
    assert 0 < base < true <= 100  # each image's own expert knows more than the base
    assert all(0 < value <= 100 for value in (merged, once))
