"""Published accuracies against measured ones."""

from pathlib import Path

import pytest
from loading import changed

from mergekit_vision.cli.main import main
from mergekit_vision.suites.expectations import departures
from mergekit_vision.suites.suite import Suite


def test_only_what_is_more_than_three_points_off_is_told() -> None:
    tasks = Suite.load("fusion_bench/ViT-B-32-8").tasks
    measured = {"dtd": 0.7968 - 0.0299, "svhn": 0.9727 - 0.0301, "mnist": None, "other": 0.1}
    (text,) = departures(tasks.values(), measured)
    assert text.startswith("the expert of task svhn scores 94.3 % on test, but 97.3 % is published; ")
    assert text.endswith(tasks["svhn"].traps[0])


def test_an_expert_that_has_seen_the_test_images_is_told() -> None:
    dtd = Suite.load("tall/ViT-B-32-8").tasks["dtd"]
    assert dtd.accuracy is None
    assert departures([dtd], {"dtd": 0.84}) == []
    (text,) = departures([dtd], {"dtd": 0.973})
    assert text.startswith("the expert of task dtd scores 97.3 % on test, but at most 90.0 % is honest; experts that score above")


def test_nothing_is_told_without_a_published_accuracy(tiny_suite: Path) -> None:
    tasks = Suite.load(tiny_suite).tasks
    assert departures(tasks.values(), dict.fromkeys(tasks, 0.0)) == []


@pytest.mark.parametrize("command", ["test", "compare"])
def test_runs_warn(command: str, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    suite = changed(root, lambda tasks: tasks["stripes"].update(accuracy=0.0 if command == "test" else 100.0, traps=["beware"]))
    method = ["-m", "Average"] if command == "test" else ["--mergers", "[Average]", "--scale", "merger"]
    assert main([command, "-s", suite, *method, "-o", str(tmp_path / "out")]) == 0
    (text,) = (record.getMessage() for record in caplog.records if "is published" in record.getMessage())
    assert text.startswith("the expert of task stripes scores")
    assert text.endswith("; beware")


def test_names_that_are_swapped_on_purpose_pass_and_others_do_not(root: Path, tmp_path: Path) -> None:
    def swap(misnamed: list[int]) -> str:
        classes = ["green", "red", "blue"]
        return changed(root, lambda tasks: tasks["colors"].update(classes=classes, misnamed=misnamed))

    arguments = ["-m", "Average", "-o", str(tmp_path / "out")]
    assert main(["test", "-s", swap([]), *arguments]) == 1
    assert main(["test", "-s", swap([0, 1]), *arguments]) == 0
