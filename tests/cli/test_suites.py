"""``mergekit-vision suites``."""

import json

import pytest

from mergekit_vision.cli.main import main
from mergekit_vision.suites.catalog import PublishedSuite, published


def test_json_lists_every_suite_with_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == list(published())
    smallest = found["fusion_bench/ViT-B-32-8"]
    assert smallest["experts_gb"] == 2.8  # eight of 350 MB
    assert smallest["images"]["test"] == 19850 + 8041 + 6300 + 2700 + 26032 + 12630 + 10000 + 1880
    assert found["tall/ViT-B-32-14"]["data_licenses"] == {"oxford-iiit-pet": "cc-by-sa-4.0", "pcam": "cc0-1.0"}


def test_json_of_one_lists_its_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", "fusion_bench/ViT-B-32-20", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["food101"]["variant"]
    assert (found["food101"]["accuracy"], found["food101"]["classes"]) == (88.41, 101)
    assert found["mnist"]["expert"] == "hf-hub:tanganke/clip-vit-base-patch32_mnist"


def test_tables_name_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in published())
    assert main(["suites", "tall/ViT-L-14-20"]) == 0
    printed = capsys.readouterr().out
    suite = PublishedSuite.load("tall/ViT-L-14-20")
    assert all(name in printed for name in suite.tasks)
    assert suite.caveat
    assert suite.caveat in printed.replace("\n", " ")


@pytest.mark.parametrize(("arguments", "hint"), [(["tall/ViT-B-32"], "did you mean `tall/ViT-B-32-8`"), (["--jsn"], "--jsn")])
def test_mistakes(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", *arguments]) == 1
    assert hint in capsys.readouterr().err
