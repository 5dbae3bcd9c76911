"""Published suites in miniature, from a hub on the loopback interface through ``merge`` and ``test``."""

import json
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub
from published_hub import IMAGES, miniature

from mergekit_vision.cli.main import main
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.catalog import PublishedSuite
from mergekit_vision.suites.suite import Suite


@pytest.mark.parametrize(("name", "left_out"), [("fusion_bench/ViT-B-32-8", 0), ("tall/ViT-B-16-8", 5)])
def test_a_published_suite_from_experts_to_results(
    name: str,
    left_out: int,
    loopback_hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    published = list(PublishedSuite.load(name).tasks)[left_out:]
    others = dict.fromkeys(list(PublishedSuite.load(name).tasks)[:left_out])
    suite = str(miniature(loopback_hub, name, tmp_path, monkeypatch, tasks=others))
    merged, results = tmp_path / "merged", tmp_path / "results"
    assert main(["merge", "-s", suite, "-m", "TaskArithmetic", "-o", str(merged)]) == 0
    assert main(["test", "-s", suite, "--merged", str(merged), "-o", str(results)]) == 0
    found = json.loads((results / "results.json").read_text())
    assert list(found["tasks"]) == published
    assert {task: source["split"] for task, source in found["hub"].items()} == dict.fromkeys(published, "test")
    for source in found["hub"].values():
        assert source["commit"] == loopback_hub.repositories["dataset", source["hub"]].refs["main"]
    warned = [record.getMessage() for record in caplog.records if "is published" in record.getMessage()]
    assert [text.split()[4] for text in warned] == published  # they are no experts, but noise


@pytest.mark.parametrize("name", ["fusion_bench/ViT-B-32-20"])
def test_all_data_opens_in_the_schemas_of_the_hub(
    name: str, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Suite.load(miniature(loopback_hub, name, tmp_path, monkeypatch))
    for task in suite.tasks.values():
        val, test = (open_source(task.data[split]) for split in ("val", "test"))
        assert (len(val), len(test)) == (IMAGES["train"] // 10, IMAGES["test"]), task.name
        assert [type(label) for label in test.labels()] == [int] * len(test)
        assert test[0][1] == test.labels()[0]
