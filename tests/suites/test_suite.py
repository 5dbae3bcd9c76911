"""Suites: what a file says becomes tasks, paths and experts."""

from pathlib import Path

import pytest
from tiny import TASKS, content_of, write_file

import mergekit_vision.checkpoints
from mergekit_vision.errors import InputError
from mergekit_vision.suites.suite import Suite


def test_load_makes_paths_absolute(tiny_suite: Path) -> None:
    suite, root = Suite.load(tiny_suite), tiny_suite.parent
    assert (suite.name, suite.backbone, suite.pretrained) == ("tiny", f"local-dir:{root}/base", None)
    assert tuple(suite.tasks) == ("colors", "grays", "stripes")
    task = suite.tasks["grays"]
    assert task.expert.path == root / "experts" / "grays.pt"
    assert task.data["val"] == {"parquet": str(root / "data" / "grays" / "val.parquet")}
    assert (task.classes, task.templates) == TASKS["grays"]


def test_a_relative_suite_path_gives_absolute_paths(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_suite.parent)
    assert Suite.load("suite.yaml").tasks["grays"].expert.path.is_absolute()


def test_defaults(root: Path) -> None:
    content = content_of(root)
    del content["name"]
    for key in ("classes", "templates"):
        del content["tasks"]["colors"][key]
    content["backbone"], content["pretrained"] = "ViT-B-32-quickgelu", "openai"
    suite = Suite.load(write_file(root, content))
    assert (suite.name, suite.backbone, suite.pretrained) == ("suite", "ViT-B-32-quickgelu", "openai")
    assert suite.tasks["colors"].classes == ("red", "green", "blue")  # from the Parquet metadata
    assert suite.tasks["colors"].templates == ("a photo of a {}.",)
    content["pretrained"] = "weights/clip.pt"
    assert Suite.load(write_file(root, content)).pretrained == str(root / "weights" / "clip.pt")


def test_an_expert_is_opened_once_and_only_when_it_is_asked_for(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    opening = mergekit_vision.checkpoints.open_expert
    monkeypatch.setattr("mergekit_vision.suites.suite.open_expert", lambda at: opened.append(at.path) or opening(at))
    suite = Suite.load(tiny_suite)
    assert list(suite.experts) == list(TASKS)
    assert len(suite.experts) == 3
    assert opened == []
    first = suite.experts["grays"]
    assert suite.experts["grays"] is first
    assert first.path == suite.tasks["grays"].expert.path
    assert opened == [first.path]
    for _ in range(2):
        assert [weights.path for weights in suite.experts.values()] == [task.expert.path for task in suite.tasks.values()]
    assert len(opened) == 3


def test_an_expert_that_cannot_be_opened_is_named_when_it_is_asked_for(root: Path) -> None:
    (root / "experts" / "stripes.safetensors").unlink()
    suite = Suite.load(root / "suite.yaml")
    assert "stripes" in suite.experts
    assert suite.experts["colors"].shapes
    with pytest.raises(InputError, match=r"stripes\.safetensors: cannot be read"):
        suite.experts["stripes"]
    with pytest.raises(KeyError):
        suite.experts["nothing"]
