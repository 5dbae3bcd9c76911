"""Suites that extend a published one, and those whose experts and data lie on disk."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from suite_faults import faults_of
from tiny import write_file

from mergekit_vision.errors import InputError
from mergekit_vision.suites.catalog import PublishedSuite, published
from mergekit_vision.suites.suite import Suite

NAME = "fusion_bench/ViT-B-32-8"
BASE = Suite.load(NAME)


def extending(place: Path, base: str = NAME, /, **own: Any) -> Suite:
    return Suite.load(write_file(place, {"extends": base, **own}))


def touch(root: Path, *names: str) -> Path:
    """Make empty files of these names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture(autouse=True)
def no_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MERGEKIT_VISION_EXPERTS", "MERGEKIT_VISION_DATA"):
        monkeypatch.delenv(variable, raising=False)


def test_without_more_it_is_the_published_suite(tmp_path: Path) -> None:
    suite = extending(tmp_path)
    assert (suite.tasks, suite.backbone, suite.pretrained) == (BASE.tasks, BASE.backbone, BASE.pretrained)


def test_what_the_file_says_comes_first(tmp_path: Path) -> None:
    own = {"expert": "mine.pt", "data": {"test": {"folder": "photos"}}, "templates": ["a {}."]}
    other = {"expert": "hf-hub:org/other", "data": {"test": {"folder": "other"}}, "classes": ["x", "y"]}
    suite = extending(tmp_path, name="mine", tasks={"dtd": own, "eurosat": None, "other": other})
    assert suite.name == "mine"
    assert list(suite.tasks) == [*(name for name in BASE.tasks if name != "eurosat"), "other"]
    task, base = suite.tasks["dtd"], BASE.tasks["dtd"]
    assert (task.expert.path, task.templates, task.classes) == (tmp_path / "mine.pt", ("a {}.",), base.classes)
    assert task.data == {**base.data, "test": {"folder": str(tmp_path / "photos")}}
    assert (task.accuracy, base.accuracy) == (None, 79.68)  # the published one is of another expert
    assert suite.tasks["mnist"] == BASE.tasks["mnist"]


def test_other_classes_are_not_misnamed(tmp_path: Path) -> None:
    classes = list(Suite.load("tall/ViT-B-32-20").tasks["food101"].classes)
    task = extending(tmp_path, "fusion_bench/ViT-B-32-20", tasks={"food101": {"classes": classes}}).tasks["food101"]
    assert (task.misnamed, task.traps, task.data_classes) == ((), (), tuple(classes))


def test_another_backbone_has_its_own_weights(tmp_path: Path) -> None:
    suite = extending(tmp_path, backbone="local-dir:base")
    assert (suite.backbone, suite.pretrained) == (f"local-dir:{tmp_path / 'base'}", None)


def test_faults_of_extending_files(tmp_path: Path) -> None:
    (line,) = faults_of(extending, tmp_path, "fusion_bench/ViT-B-32-9")
    assert line.startswith("extends: no published suite fusion_bench/ViT-B-32-9 (did you mean `fusion_bench/ViT-B-32-8`?)")
    wrong = {"dtd": {"expart": "a"}, "mnist": 3, "other": None}
    lines = faults_of(Suite.load, write_file(tmp_path, {"extends": NAME, "tasks": wrong}))
    assert lines[0].startswith("tasks.mnist: must be a mapping")
    assert lines[1] == "tasks.dtd: unknown key `expart` (did you mean `expert`?)"
    assert lines[2].startswith("tasks.other: must be a mapping")
    assert faults_of(Suite.load, write_file(tmp_path, {"extends": 3, "tasks": {}}))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("tall/ViT-B-32-8", "{title}Val/nonlinear_finetuned.pt", id="TALL"),
        pytest.param("tall/ViT-B-16-8", "single_task/VIT-B-16/{title}Val/nonlinear_finetuned.pt", id="TALL on the hub"),
        pytest.param("tall/ViT-B-32-8", "checkpoints/ViT-B-32/{title}/finetuned.pt", id="Task Arithmetic"),
        pytest.param(NAME, "ViT-B-32/{title}/finetuned.pt", id="Task Arithmetic, without its parent"),
        pytest.param(NAME, "{repository}/model.safetensors", id="fusion_bench"),
        pytest.param(NAME, "{name}.safetensors", id="own files"),
    ],
)
def test_experts_are_found_on_disk(name: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        task.name: layout.format(name=task.name, title=task.title, repository=repository_of(task)) for task in tasks_of(name)
    }
    root = touch(tmp_path / "experts", *files.values())
    expected = {task: root / file.removesuffix("/model.safetensors") for task, file in files.items()}
    assert paths_of(extending(tmp_path, name, experts_root="experts")) == expected
    monkeypatch.setenv("MERGEKIT_VISION_EXPERTS", str(root))
    assert paths_of(Suite.load(name)) == expected
    own = extending(tmp_path, name, tasks={"dtd": {"expert": "mine.pt"}})
    assert paths_of(own) == {**expected, "dtd": tmp_path / "mine.pt"}


def tasks_of(name: str) -> Iterable[Any]:
    return PublishedSuite.load(name).tasks.values()


def repository_of(task: Any) -> str:
    return str(task.expert).split("/")[1].split(":")[0]


def paths_of(suite: Suite) -> dict[str, Path | None]:
    return {name: task.expert.path for name, task in suite.tasks.items()}


def test_two_names_of_one_file_are_one_expert(tmp_path: Path) -> None:
    """As ``MNIST`` and ``mnist`` are where upper and lower case are not told apart."""
    experts = touch(tmp_path / "experts", *(f"{task.title}/finetuned.pt" for task in tasks_of(NAME)))
    (experts / "mnist.pt").hardlink_to(experts / "MNIST" / "finetuned.pt")
    (experts / "svhn.pt").symlink_to(experts / "SVHN" / "finetuned.pt")
    found = paths_of(extending(tmp_path, experts_root="experts"))
    assert all(path is not None and path.is_file() for path in found.values())


def test_experts_that_are_missing_or_ambiguous_are_all_named(tmp_path: Path) -> None:
    names = [task.title for task in tasks_of(NAME) if task.name not in ("dtd", "mnist")]
    touch(tmp_path / "experts", *(f"{name}/finetuned.pt" for name in names), "SVHNVal/nonlinear_finetuned.pt")
    lines = faults_of(Suite.load, write_file(tmp_path, {"extends": NAME, "experts_root": "experts"}))
    assert [line.split(":")[0] for line in lines] == ["tasks.svhn.expert", "tasks.mnist.expert", "tasks.dtd.expert"]
    assert "more than one" in lines[0]
    assert "DTD" in lines[2]


def test_roots_that_are_not_there_are_named_once(tmp_path: Path) -> None:
    content = {"extends": NAME, "experts_root": "none", "data_root": "neither"}
    lines = faults_of(Suite.load, write_file(tmp_path, content))
    assert lines == [
        f"experts_root: {tmp_path / 'none'}: no such directory",
        f"data_root: {tmp_path / 'neither'}: no such directory",
    ]


@pytest.mark.parametrize("named", [True, False])
def test_the_home_of_a_user_that_is_not_known_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    monkeypatch.setenv("MERGEKIT_VISION_DATA", "~nobody-here/x")
    file = write_file(tmp_path, {"extends": NAME, **({"data_root": "~nobody-here/x"} if named else {})})
    key = "data_root" if named else "MERGEKIT_VISION_DATA"
    with pytest.raises(InputError, match=rf"^{file}: {key}: ~nobody-here: no home directory of such a user is known"):
        Suite.load(file)


def test_strange_names_are_left_to_the_schema(tmp_path: Path) -> None:
    (tmp_path / "experts").mkdir()
    strange: dict[Any, Any] = {"x" * 300: {}, 7: {}, "a\0b": {}, "../up": {"data": 3}}
    content = {"backbone": "ViT-B-32-quickgelu", "experts_root": "experts", "data_root": "experts", "tasks": strange}
    assert faults_of(Suite.load, write_file(tmp_path, content))


def test_data_is_found_on_disk(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "DTD/train/banded/1.png", "DTD/test/banded/1.png")
    touch(root, "tanganke/eurosat/data/train-00000-of-00001.parquet", "tanganke/eurosat/data/test-00000-of-00001.parquet")
    touch(
        root,
        "gtsrb/val.parquet",
        "gtsrb/train.parquet",
        "gtsrb/test.parquet",
        "ufldl-stanford/svhn/cropped_digits/test-0.parquet",
    )
    kept = {name: None for name in BASE.tasks if name not in ("dtd", "eurosat", "gtsrb", "svhn")}
    tasks = extending(tmp_path, data_root="data", tasks=kept).tasks
    rule = {"part": "val", "cap": False}
    assert tasks["dtd"].data["val"] == {"folder": str(root / "DTD" / "train"), **rule}
    assert tasks["dtd"].data["test"] == {"folder": str(root / "DTD" / "test")}
    assert tasks["eurosat"].data["val"] == {"parquet": str(root / "tanganke/eurosat/data/train-*.parquet"), **rule}
    assert tasks["gtsrb"].data == {split: {"parquet": str(root / f"gtsrb/{split}.parquet")} for split in ("val", "test", "train")}
    assert tasks["svhn"].data == {"test": {"parquet": str(root / "ufldl-stanford/svhn/cropped_digits/test-*.parquet")}}


def test_columns_and_splits_of_the_published_data_are_kept(tmp_path: Path) -> None:
    root = touch(tmp_path / "data", "FER2013/test.parquet", "food101/validation.parquet")
    kept = {name: None for name in published_tasks("tall/ViT-B-32-20") if name not in ("fer2013", "food101", "emnist")}
    tasks = extending(tmp_path, "tall/ViT-B-32-20", data_root=str(root), tasks=kept).tasks
    assert tasks["fer2013"].data["test"] == {"parquet": str(root / "FER2013/test.parquet"), "image": "jpg", "label": "cls"}
    assert tasks["food101"].data == {"test": {"parquet": str(root / "food101/validation.parquet")}}
    assert tasks["emnist"].data["val"]["args"]["root"] == str(root)  # where torchvision looks, and downloads to
    assert tasks["emnist"].data["val"]["part"] == "val"


def published_tasks(name: str) -> list[str]:
    return list(PublishedSuite.load(name).tasks)


def test_data_that_is_missing_is_named_and_what_the_file_names_is_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    own = {"dtd": {"data": {"test": {"folder": "photos"}}}}
    content = {"extends": NAME, "data_root": "data", "tasks": own}
    lines = faults_of(Suite.load, write_file(tmp_path, content))
    assert [line.split(":")[0] for line in lines] == [f"tasks.{name}.data" for name in BASE.tasks if name != "dtd"]


def test_a_suite_of_ones_own_may_have_roots(tmp_path: Path) -> None:
    touch(tmp_path / "experts", "pets.safetensors")
    touch(tmp_path / "data", "pets/train/cat/1.png", "pets/test/cat/1.png")
    content = {
        "backbone": "ViT-B-32-quickgelu",
        "experts_root": "experts",
        "data_root": "data",
        "tasks": {"pets": {"classes": ["cat"]}},
    }
    task = Suite.load(write_file(tmp_path, content)).tasks["pets"]
    assert task.expert.path == tmp_path / "experts" / "pets.safetensors"
    assert {split: source.get("part") for split, source in task.data.items()} == {"val": "val", "test": None, "train": "train"}


def test_the_environment_changes_no_suite_that_names_everything(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Suite.load(tiny_suite)
    for variable in ("MERGEKIT_VISION_EXPERTS", "MERGEKIT_VISION_DATA"):
        monkeypatch.setenv(variable, "/no/such/directory")
    assert Suite.load(tiny_suite).tasks == before.tasks


def test_every_published_suite_can_be_extended(tmp_path: Path) -> None:
    assert [len(extending(tmp_path, name).tasks) for name in published()] == [8, 14, 20] * 6
