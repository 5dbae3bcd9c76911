"""The benchmarks run end to end, and the sides of a comparison compute the same."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from tolerances import assert_near, eps, forward
from torch import Tensor
from torch.fx import GraphModule

from benchmarks import evaluation, merging, reading, routing, scaling
from benchmarks.records import read
from mergekit_vision.encoders.vision import VisionEncoder

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


def rows(results: Path, benchmark: str) -> list[Any]:
    """All rows that a benchmark has left, of one run."""
    (run,) = read(results / f"{benchmark}.json")
    return run.rows


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
def test_ours_is_the_textbook_in_float64(model: str, workdir: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = merging.prepare(workdir, model, None, TASKS, proxies=8)
    case = merging.Case.of(files, model=model, layers=3, method=method, implementation="ours")
    exact = merging.replace(case, implementation="textbook", double=True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    figures = [merging.work(one.to_json()) for one in (case, exact)]
    assert not torch.backends.cudnn.allow_tf32, "convolutions would not be float32 on CUDA"
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["peak_MiB"] >= row["idle_MiB"] > 0 for row in figures)
    assert all(("forward_seconds" in row) == (method == "ESM") for row in figures)
    found = merging.errors(case, exact.output)
    assert 0 < found["error"] < ERROR
    assert 0 < found["update_error"] < UPDATE_ERROR
    # the comparison sees a model that is off
    case.output.write_bytes(files.base.read_bytes())
    assert merging.errors(case, exact.output)["update_error"] == pytest.approx(1)


def test_runs_end_to_end(
    model: str,
    workdir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--models", model, "--tasks", str(TASKS), "--methods", "ESM", "--proxies", "8", "--layers", "1"]
    merging.main([*command, "--workdir", str(workdir), "--results", str(tmp_path), "--check", "float32"])
    textbook, ours = rows(tmp_path, "merging")
    assert (textbook.case["implementation"], ours.case["implementation"]) == ("textbook", "ours")
    assert ours.case["layers"] == "1 of 3"
    assert ours.values["speedup"] == pytest.approx(textbook.values["seconds"] / ours.values["seconds"], rel=2e-3)
    assert ours.values["update_error"] < UPDATE_ERROR
    assert "layers 1 of 3" in capsys.readouterr().out
    assert not list((workdir / "tiny-1-blocks").glob("*-ours-float32*")), "measured models are left behind"


def test_experts_are_made_once_and_do_not_depend_on_how_many_there_are(model: str, workdir: Path) -> None:
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


def test_a_run_that_dies_is_reported(model: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")  # the command that fails
    files = merging.prepare(workdir, model, 1, 2, proxies=2)
    cases = [merging.Case.of(files, model=model, layers=1, method="TSVM", implementation=name) for name in ("ours", "textbook")]
    textbook, ours = merging.compare(cases, {"tasks": 2}, repeats=2, check="float64")
    assert textbook.case == {"tasks": 2, "method": "TSVM", "implementation": "textbook"}
    assert textbook.failed == ours.failed == "nothing on standard error (exit status 1)"


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    """Options that keep a benchmark's files beside the test."""
    return ["--workdir", str(tmp_path), "--results", str(tmp_path / "results")]


EVALUATION = ["--images", "12", "--batches", "8", "--workers", "0", "--seconds", "0"]


def test_evaluation_counts_every_image_and_agrees_with_the_bare_loop(model: str, places: list[str], tmp_path: Path) -> None:
    evaluation.main([*places, "--model", model, *EVALUATION])
    bare, *others = rows(tmp_path / "results", "evaluation")
    assert [row.case["variant"] for row in (bare, *others)] == ["bare loop", "test", "test, decoding, 0 workers"]
    assert all(row.case["images"] == 24 and row.repeats == 3 for row in (bare, *others))
    assert (bare.values["speedup"], bare.values["cpu_speedup"]) == (1, 1)
    assert all(row.values["speedup"] > 0 and row.values["images_per_second"] > 0 for row in others)


def test_evaluation_refuses_sides_that_disagree(
    model: str, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = evaluation.Case.bare

    def wrong(case: Any) -> tuple[Any, dict[str, float]]:
        cost, accuracies = bare(case)
        return cost, {task: value + 1 / 12 for task, value in accuracies.items()}

    monkeypatch.setattr(evaluation.Case, "bare", wrong)
    with pytest.raises(RuntimeError, match="test and the bare loop disagree"):
        evaluation.main([*places, "--model", model, *EVALUATION])
    assert not (tmp_path / "results").exists()


def test_reading_measures_every_kind_of_file_and_refuses_images_that_differ(
    model: str, places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*places, "--model", model, "--images", "6", "--batch", "4", "--rounds", "1"]
    reading.main(command)
    *readers, forward = rows(tmp_path / "results", "reading")
    assert [row.case["images"] for row in (*readers, forward)] == [6] * 7
    assert all(row.values["images_per_cpu_second"] > 0 and 0 < row.values["share"] < 1 for row in readers)
    assert [row.values["cpu_speedup"] for row in readers if "bare loop" in row.case["variant"]] == [1, 1]
    assert "share" not in forward.values
    ours = reading.ours
    other = {"folder": str(reading.photos(tmp_path / "other", 6, seed=1))}
    monkeypatch.setattr(reading, "ours", lambda config, *rest: ours(other, *rest) if "parquet" in config else ours(config, *rest))
    with pytest.raises(RuntimeError, match="PNG in Parquet and the bare loop disagree"):
        reading.main(command)


def test_dynamic_encoders_take_turns_with_the_plain_one(model: str, places: list[str], tmp_path: Path) -> None:
    routing.main([*places, "--models", model, "--tasks", "3", "--batches", "2", "--seconds", "0"])
    plain, *routed = rows(tmp_path / "results", "routing")
    assert (plain.case["variant"], plain.values["slowdown"], plain.values["added_MiB"]) == ("plain encoder", 1, 0)
    assert [row.case["variant"] for row in routed] == [*routing.VARIANTS, "all 3 experts"]
    assert all(row.values["cpu_slowdown"] > 0 and row.values["added_MiB"] > 0 for row in routed)


def test_every_dynamic_encoder_runs_compiled(model: str) -> None:
    """However many take turns: there are more of them than versions of one code that torch keeps."""
    torch.manual_seed(0)
    visual = open_clip.create_model(model, load_weights=False).visual
    del visual.transformer.resblocks[1:]
    plain = VisionEncoder(visual).eval().requires_grad_(False)
    encoders = [plain, *(routing.routed(plain, 3, variant) for variant in routing.VARIANTS.values())]
    images, made, ran = torch.randn(2, 3, 32, 32), [], []

    def backend(graph: GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return lambda *inputs: ran.append(graph) or graph(*inputs)

    with torch.inference_mode():
        runs = [routing.compiled(encoder, backend) for encoder in encoders]
        for _ in range(2):
            for run, encoder in zip(runs, encoders, strict=True):
                assert_near(run(images), encoder(images), forward(2 * 4, 4 * 64))
    assert len(made) == len(encoders) > 8
    assert ran == made * 2


@pytest.mark.slow
def test_processes_share_a_merge(model: str, places: list[str], tmp_path: Path) -> None:
    command = [*places, "--model", model, "--tasks", "2", "--proxies", "4", "--methods", "TSVM", "--cases", "1x1", "1x2", "2x1"]
    scaling.main(command)
    one, threads, processes, modeled = rows(tmp_path / "results", "scaling")
    assert [(row.case["processes"], row.case["threads"]) for row in (one, threads, processes)] == [(1, 1), (1, 2), (2, 1)]
    assert one.values["speedup"] == one.values["cpu_speedup"] == 1
    assert processes.values["cpu_speedup"] > 0
    assert (modeled.case["threads"], modeled.case["source"]) == (16, "Amdahl's law")


@pytest.mark.slow
def test_dynamic_models_beside_their_adapters(tiny_suite: Path, places: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapters = importlib.import_module("benchmarks.adapters")
    adapters.main([*places, str(tiny_suite), "--methods", "SMILE"])
    found = {row.case["choice"]: row.values["accuracy"] for row in rows(tmp_path / "results", "adapters")}
    assert 0 < found["base"] < found["true expert"] <= 100  # each image's own expert knows more than the base
    assert all(0 < found[choice] <= 100 for choice in ("as merged", "once per image"))
