"""Layout of suite files: every fault is found and named."""

from pathlib import Path
from typing import Any

import pytest
from suite_faults import faults_of
from tiny import content_of, write_file

from mergekit_vision.checkpoints import ExpertSource
from mergekit_vision.checkpoints.hub import HubFile
from mergekit_vision.errors import InputError
from mergekit_vision.suites.layout import read_suite, suite_schema
from mergekit_vision.suites.suite import Suite


def test_every_fault_of_the_layout_is_listed(root: Path) -> None:
    content = content_of(root)
    content["bakcbone"] = content.pop("backbone")
    colors, grays, stripes = content["tasks"].values()
    colors["experts"] = colors.pop("expert")
    colors["classes"] = ["red", False, 3]
    grays["templates"] = ["a gray", "a {} grey"]
    grays["data"]["val"] = {"parqet": "x.parquet"}
    grays["data"]["test"] = {"parquet": 3, "lable": "y"}
    stripes["data"] = []
    content["tasks"]["a task"] = stripes
    content["tasks"]["nothing"] = None
    lines = faults_of(Suite.load, write_file(root, content))
    assert lines == [
        "the file: unknown key `bakcbone` (did you mean `backbone`?)",
        "the file: `backbone` is missing",
        "tasks.colors: unknown key `experts` (did you mean `expert`?)",
        "tasks.colors: `expert` is missing",
        "tasks.colors.classes: entry 1 must be text, not the bool False; put it in quotes",
        "tasks.colors.classes: entry 2 must be text, not the int 3; put it in quotes",
        "tasks.grays.data.val: unknown key `parqet` (did you mean `parquet`?); "
        "a source is one of parquet, hub, folder, torchvision",
        "tasks.grays.data.test: unknown key `lable` (did you mean `label`?)",
        "tasks.grays.data.test.parquet: must be text, not the int 3",
        "tasks.grays.templates: entry 0 'a gray' has no {} for the class name",
        "tasks.stripes.data: must be a mapping of splits (val, test, train) to data sources, not the list []",
        "tasks: task name 'a task' must be text of letters, digits, `_` and `-` (quote a number)",
        "tasks.a task.data: must be a mapping of splits (val, test, train) to data sources, not the list []",
        "tasks.nothing: must be a mapping with the keys expert, data, not empty",
    ]


def test_other_braces_in_a_template_are_text(root: Path) -> None:
    content = content_of(root)
    content["tasks"]["grays"]["templates"] = ["a {} {shade} }{", "{} and {}"]
    assert Suite.load(write_file(root, content)).tasks["grays"].templates == ("a {} {shade} }{", "{} and {}")
    content["tasks"]["grays"]["templates"] = ["a {shade}", "a { }"]
    assert len(faults_of(Suite.load, write_file(root, content))) == 2


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "must be a mapping with the keys backbone, tasks, not empty"),
        ("a: [", "not valid YAML"),
        ("backbone: x\nbackbone: y\n", "key 'backbone' is given twice"),
        ("backbone: x\ntasks: {}\n", "with one task at least"),
        ("backbone: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("backbone: local-dir:x\npretrained: openai\ntasks: {a: {expert: e, data: {val: {folder: f}}}}", "remove `pretrained`"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str, hint: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=hint):
        Suite.load(tmp_path / "s.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        Suite.load(tmp_path / "missing.yaml")


def test_classes_missing_from_suite_and_data(root: Path) -> None:
    content = content_of(root)
    del content["tasks"]["grays"]["classes"]
    content["tasks"]["grays"]["data"] = {"val": {"parquet": "data/none.parquet"}}
    lines = faults_of(Suite.load, write_file(root, content))
    assert lines == [f"tasks.grays.data.val: {root}/data/none.parquet: no such file"]


def test_paths_that_can_be_none_are_faults_like_others(root: Path) -> None:
    content = content_of(root)
    content["backbone"] = "local-dir:~nobody-of-this-name/base"
    colors, grays, stripes = content["tasks"].values()
    colors["expert"] = "a\0b.pt"
    grays["data"]["val"] = {"folder": "~nobody-of-this-name"}
    stripes["data"]["test"] = {"torchvision": "torchvision.datasets.MNIST", "args": {"root": "~nobody-of-this-name"}}
    lines = faults_of(Suite.load, write_file(root, content))
    assert [line.split(": ")[0] for line in lines] == [
        "backbone",
        "tasks.colors.expert",
        "tasks.grays.data.val.folder",
        "tasks.stripes.data.test.args",
    ]
    assert "NUL" in lines[1]
    assert all("no home directory of such a user" in line for line in lines if "expert" not in line)


def test_a_name_too_long_for_a_file_is_no_file(root: Path) -> None:
    content = content_of(root)
    long = "x" * 300
    content["tasks"]["colors"]["expert"] = long
    content["tasks"]["grays"]["data"]["val"] = {"hub": long, "split": "test"}
    assert Suite.load(write_file(root, content)).tasks["grays"].data["val"]["hub"] == long
    del content["tasks"]["stripes"]["classes"]
    for kind in ("parquet", "folder"):
        content["tasks"]["stripes"]["data"] = {"val": {kind: long}}
        (line,) = faults_of(Suite.load, write_file(root, content))
        assert line.startswith("tasks.stripes.data.val: ")


@pytest.mark.parametrize("name", ["", " ", "~nobody-of-this-name/suite.yaml", "a\0b", "x" * 300, "."])
def test_what_names_no_suite(name: str) -> None:
    with pytest.raises(InputError):
        Suite.load(name)


@pytest.mark.parametrize(
    ("expert", "expected"),
    [
        ("x.pt", {"path": "x.pt"}),
        ({"path": "x", "kind": "lora", "scale": 2}, {"path": "x", "kind": "lora", "scale": 2.0}),
        ({"path": "x", "key": "teacher", "ema": True}, {"path": "x", "key": "teacher", "ema": True}),
        ("hf-hub:org/name@v1:a/b.pt", {"hub": ("org/name", "v1", "a/b.pt")}),
        ({"hub": "org/name", "revision": "v2"}, {"hub": ("org/name", "v2", None)}),
    ],
)
def test_experts_are_texts_or_mappings(tmp_path: Path, expert: object, expected: dict[str, Any]) -> None:
    task = {"expert": expert, "data": {"val": {"folder": "d"}}}
    path = write_file(tmp_path, {"backbone": "ViT-B-32", "tasks": {"a": task}})
    found = read_suite(path)["tasks"]["a"]["expert"]
    plain = {"path": tmp_path / expected.pop("path")} if "path" in expected else {"hub": HubFile(*expected.pop("hub"))}
    assert found == ExpertSource(**plain, **expected)


@pytest.mark.parametrize(
    ("expert", "fault"),
    [
        ({"path": "x", "hub": "a/b"}, "tasks.a.expert: needs `path`"),
        ({"kind": "lora"}, "tasks.a.expert: needs `path`"),
        ({"path": "x", "revision": "v"}, "tasks.a.expert: `revision` goes with `hub`"),
        ({"hub": "name"}, "tasks.a.expert: name: must be hf-hub:org/name"),
        ({"path": "x", "knd": "lora"}, "tasks.a.expert: unknown key `knd` (did you mean `kind`?)"),
        ({"path": "x", "kind": "lra"}, "tasks.a.expert.kind: must be auto, weights, delta or lora"),
        ({"path": "x", "scale": float("nan")}, "tasks.a.expert.scale: must be a finite number"),
        (3, "tasks.a.expert: must be the path of a checkpoint"),
        ("hf-hub:x", "tasks.a.expert: hf-hub:x: must be hf-hub:org/name"),
    ],
)
def test_faults_of_experts_are_named(tmp_path: Path, expert: object, fault: str) -> None:
    task = {"expert": expert, "data": {"val": {"folder": "d"}}}
    (line,) = faults_of(read_suite, write_file(tmp_path, {"backbone": "ViT-B-32", "tasks": {"a": task}}))
    assert line.startswith(fault)


def test_the_schema_for_editors_knows_every_key(root: Path) -> None:
    schema = suite_schema()
    task = schema["$defs"]["_Task"]
    content = content_of(root)
    assert content.keys() < schema["properties"].keys()
    assert {"extends", "experts_root", "data_root"} <= schema["properties"].keys()
    assert all(entry.keys() < task["properties"].keys() for entry in content["tasks"].values())
    assert not schema["additionalProperties"]
    kinds = [kind["required"][0] for kind in task["properties"]["data"]["additionalProperties"]["anyOf"]]
    assert kinds == ["parquet", "hub", "folder", "torchvision"]
    text, mapping = task["properties"]["expert"]["anyOf"]
    assert (text["type"], "revision" in mapping["properties"]) == ("string", True)


def test_misnamed_classes_are_indices(root: Path) -> None:
    content = content_of(root)
    content["tasks"]["colors"] |= {"misnamed": [1, 3], "accuracy": 101.0}
    content["tasks"]["grays"]["misnamed"] = [5]
    lines = faults_of(Suite.load, write_file(root, content))
    assert lines[0].startswith("tasks.colors.accuracy: must be")
    assert lines[1] == "tasks.grays: `misnamed` holds 5, which is no index in `classes`"


def test_what_only_names_a_suite_is_hinted_at() -> None:
    with pytest.raises(InputError, match=r"neither a file nor a built-in suite .*did you mean `tall/ViT-B-32-8`"):
        Suite.load("tall/ViT-B-32-80")
