"""Published suites in miniature, from a hub on the loopback interface through ``merge`` and ``test``."""

import json
from pathlib import Path

import published_hub
import pytest
from loopback_hub import LoopbackHub, point_at
from published_hub import IMAGES, labels_of, miniature, names_in_data, push_data, serve_emnist

from mergekit_vision.cli.main import main
from mergekit_vision.sources.checks import content_faults
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.catalog import PublishedSuite, published
from mergekit_vision.suites.suite import Suite


def go_through(suite: Path, hub: LoopbackHub, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Merge the experts of a suite and evaluate the result; everything is in the results, and that the experts are but noise."""
    merged, results = place / "merged", place / "results"
    assert main(["merge", "-s", str(suite), "-m", "TaskArithmetic", "-o", str(merged)]) == 0
    assert main(["test", "-s", str(suite), "--merged", str(merged), "-o", str(results)]) == 0
    found, tasks = json.loads((results / "results.json").read_text()), Suite.load(suite).tasks
    assert list(found["tasks"]) == list(tasks)
    assert [each["n"] for each in found["tasks"].values()] == [IMAGES["test"]] * len(tasks)
    on_hub = {name: task.data["test"]["split"] for name, task in tasks.items() if "hub" in task.data["test"]}
    assert {task: source["split"] for task, source in found["hub"].items()} == on_hub
    for source in found["hub"].values():
        assert source["commit"] == hub.repositories["dataset", source["hub"]].refs["main"]
    warned = [record.getMessage() for record in caplog.records if "is published" in record.getMessage()]
    assert [text.split()[4] for text in warned] == [name for name, task in tasks.items() if task.accuracy is not None]


@pytest.mark.parametrize(("name", "left_out"), [("fusion_bench/ViT-B-32-8", 0), ("tall/ViT-B-16-8", 5)])
def test_a_published_suite_from_experts_to_results(
    name: str,
    left_out: int,
    loopback_hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    others = dict.fromkeys(list(PublishedSuite.load(name).tasks)[:left_out])
    suite = miniature(loopback_hub, name, tmp_path, monkeypatch, tasks=others)
    go_through(suite, loopback_hub, tmp_path, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", published())
def test_every_published_suite_is_fetched_and_runs_offline(
    name: str, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    suite = miniature(loopback_hub, name, tmp_path, monkeypatch)
    assert main(["fetch", "-s", str(suite)]) == 0
    point_at(loopback_hub, tmp_path / "home", monkeypatch, offline=True)
    loopback_hub.requests.clear()
    go_through(suite, loopback_hub, tmp_path, caplog)
    assert loopback_hub.requests == []


@pytest.mark.parametrize("name", ["fusion_bench/ViT-B-32-20"])
def test_all_data_opens_in_the_schemas_of_the_hub(
    name: str, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Suite.load(miniature(loopback_hub, name, tmp_path, monkeypatch))
    for task in suite.tasks.values():
        val, test = (open_source(task.data[split]) for split in ("val", "test"))
        assert (len(val), len(test)) == (IMAGES["train"] // 10, IMAGES["test"]), task.name  # of these splits alone
        assert [type(label) for label in test.labels()] == [int] * len(test)
        assert list(test.labels()) == labels_of(PublishedSuite.load(name).tasks[task.name], len(test)), task.name
        assert test[0][1] == test.labels()[0]


def test_images_of_emnist_stay_as_torchvision_has_them(
    loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_emnist(loopback_hub, monkeypatch)
    source = open_source(PublishedSuite.load("tall/ViT-B-32-20").tasks["emnist"].content["data"]["test"])
    image, label = source[3]
    assert (label, source.labels()[3], source.names) == (3, 3, tuple("0123456789"))
    assert [image.getpixel(corner) for corner in ((0, 0), (27, 0), (0, 27))] == [(255,) * 3, (255,) * 3, (0,) * 3]  # transposed


@pytest.mark.parametrize(
    ("swapped", "message"),
    [
        ({}, ""),  # classes 16 and 17 have each other's text on purpose
        ({0: "Baby Back Ribs", 1: "apple-pie"}, "class 0 is `Baby Back Ribs` in the data, but `apple pie` under `classes`"),
    ],
)
def test_names_of_the_data_are_compared_with_the_texts(
    swapped: dict[int, str], message: str, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    task = PublishedSuite.load("fusion_bench/ViT-B-32-20").tasks["food101"]
    names = [swapped.get(index, name) for index, name in enumerate(names_in_data(task))]
    monkeypatch.setattr(published_hub, "names_in_data", lambda _: names)
    push_data(loopback_hub, task)
    point_at(loopback_hub, tmp_path / "home", monkeypatch)
    known = Suite.load("fusion_bench/ViT-B-32-20").tasks["food101"]
    found = content_faults(open_source(known.data["test"]), known.data_classes)
    assert [fault.split(";")[0] for fault in found] == [message] * bool(message)
