import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TASKS, write_parquet
from safetensors.torch import save_file

from mergekit_vision.checkpoints import open_weights
from mergekit_vision.errors import InputError
from mergekit_vision.suites.suite import Suite


@pytest.fixture
def root(tiny_suite: Path, tmp_path: Path) -> Path:
    """A copy of the tiny suite that a test may spoil."""
    return Path(shutil.copytree(tiny_suite.parent, tmp_path / "suite"))


def content_of(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "suite.yaml").read_text())


def rewrite(root: Path, content: dict[str, Any]) -> Path:
    (root / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return root / "suite.yaml"


def faults_of(call, *args) -> list[str]:
    """The lines of the one error that a call raises, without the first, which must count them."""
    with pytest.raises(InputError) as caught:
        call(*args)
    head, *lines = str(caught.value).split("\n  ")
    assert "suite.yaml" in head
    assert f": {len(lines)} fault" in head
    return lines


def shapes_of(root: Path) -> dict[str, tuple[int, ...]]:
    return open_weights(root / "base" / "open_clip_model.safetensors").shapes


def test_load_makes_paths_absolute(tiny_suite: Path):
    suite, root = Suite.load(tiny_suite), tiny_suite.parent
    assert (suite.name, suite.backbone, suite.pretrained) == ("tiny", f"local-dir:{root}/base", None)
    assert tuple(suite.tasks) == ("colors", "grays", "stripes")
    task = suite.tasks["grays"]
    assert task.expert == root / "experts" / "grays.pt"
    assert task.data["val"] == {"parquet": str(root / "data" / "grays" / "val.parquet")}
    assert (task.classes, task.templates) == TASKS["grays"]


def test_a_relative_suite_path_gives_absolute_paths(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tiny_suite.parent)
    assert Suite.load("suite.yaml").tasks["grays"].expert.is_absolute()


def test_sound_suites_pass(tiny_suite: Path, zoo: Path):
    for path in (tiny_suite, zoo / "suite.yaml"):
        Suite.load(path).check(shapes_of(path.parent), {"val", "test"})


def test_defaults(root: Path):
    content = content_of(root)
    del content["name"]
    for key in ("classes", "templates"):
        del content["tasks"]["colors"][key]
    content["backbone"], content["pretrained"] = "ViT-B-32-quickgelu", "openai"
    suite = Suite.load(rewrite(root, content))
    assert (suite.name, suite.backbone, suite.pretrained) == ("suite", "ViT-B-32-quickgelu", "openai")
    assert suite.tasks["colors"].classes == ("red", "green", "blue")  # from the Parquet metadata
    assert suite.tasks["colors"].templates == ("a photo of a {}.",)
    content["pretrained"] = "weights/clip.pt"
    assert Suite.load(rewrite(root, content)).pretrained == str(root / "weights" / "clip.pt")


def test_every_fault_of_the_layout_is_listed(root: Path):
    content = content_of(root)
    content["bakcbone"] = content.pop("backbone")
    colors, grays, stripes = content["tasks"].values()
    colors["experts"] = colors.pop("expert")
    colors["classes"] = ["red", False, 3]
    grays["templates"] = ["a grey", "a {} grey"]
    grays["data"]["val"] = {"parqet": "x.parquet"}
    grays["data"]["test"] = {"parquet": 3, "lable": "y"}
    stripes["data"] = []
    content["tasks"]["a task"] = stripes
    content["tasks"]["nothing"] = None
    lines = faults_of(Suite.load, rewrite(root, content))
    assert lines == [
        "the file: unknown key `bakcbone` (did you mean `backbone`?)",
        "the file: `backbone` is missing",
        "tasks.colors: unknown key `experts` (did you mean `expert`?)",
        "tasks.colors: `expert` is missing",
        "tasks.colors.classes: entry 1 must be text, not the bool False; put it in quotes",
        "tasks.colors.classes: entry 2 must be text, not the int 3; put it in quotes",
        "tasks.grays.data.val: unknown key `parqet` (did you mean `parquet`?); "
        "a source is one of parquet, hub, folder, torchvision",
        "tasks.grays.data.test: unknown key `lable` (did you mean `label`?); known are parquet, image, label",
        "tasks.grays.data.test: `parquet` must be a text, not 3",
        "tasks.grays.templates: 'a gray' has no {} for the class name",
        "tasks.stripes.data: must be a mapping of splits (val, test, train) to data sources, not the list []",
        "tasks: task name 'a task' must be text of letters, digits, `_` and `-` (quote a number)",
        "tasks.nothing: must be a mapping with the keys expert, data, not empty",
    ]


def test_other_braces_in_a_template_are_text(root: Path):
    content = content_of(root)
    content["tasks"]["grays"]["templates"] = ["a {} {shade} }{", "{} and {}"]
    assert Suite.load(rewrite(root, content)).tasks["grays"].templates == ("a {} {shade} }{", "{} and {}")
    content["tasks"]["grays"]["templates"] = ["a {shade}", "a { }"]
    assert len(faults_of(Suite.load, rewrite(root, content))) == 2


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
def test_unusable_files(tmp_path: Path, text: str, hint: str):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(InputError, match=hint):
        Suite.load(tmp_path / "s.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        Suite.load(tmp_path / "missing.yaml")


def test_every_fault_of_experts_and_data_is_listed(root: Path):
    colors = root / "experts" / "colors.safetensors"
    weights = dict(open_weights(colors))
    del weights["visual.proj"]
    weights["visual.extra"] = torch.zeros(1)
    weights["visual.ln_pre.bias"] = torch.zeros(7)
    save_file(weights, colors)
    (root / "experts" / "grays.pt").write_bytes(b"PK\x03\x04 damaged")
    (root / "experts" / "stripes.safetensors").unlink()
    (root / "data" / "colors" / "test.parquet").unlink()
    (root / "data" / "grays" / "test.parquet").write_text("not Parquet")
    write_parquet(root / "data" / "stripes" / "val.parquet", "stripes", ("a", "b", "c"), 9, seed=1)
    content = content_of(root)
    del content["tasks"]["grays"]["data"]["val"]
    suite = Suite.load(rewrite(root, content))
    lines = faults_of(suite.check, shapes_of(root), ["val", "test"])
    starts = [
        ("tasks.colors.expert: ", "lacks visual.proj"),
        ("tasks.colors.expert: ", "has unknown visual.extra"),
        ("tasks.colors.expert: ", "visual.ln_pre.bias is (7,), not (32,)"),
        ("tasks.colors.data.test: ", "no such file"),
        ("tasks.grays.expert: ", "truncated, damaged"),
        ("tasks.grays.data.val: ", "missing"),
        ("tasks.grays.data.test: ", "not a readable Parquet file"),
        ("tasks.stripes.expert: ", "cannot be read (No such file"),
        ("tasks.stripes.data.val: ", "the data has 3 classes, but there are 2 under `classes`"),
    ]
    assert len(lines) == len(starts)
    for line, (start, part) in zip(lines, starts, strict=True):
        assert line.startswith(start)
        assert part in line
    without = faults_of(suite.check, shapes_of(root), ["test"], False)
    assert [line.split(":")[0] for line in without] == ["tasks.colors.data.test", "tasks.grays.data.test"]


def test_long_lists_of_keys_are_shortened(root: Path):
    shapes = {**shapes_of(root), **{f"visual.new.{i}": (1,) for i in range(30)}}
    lines = faults_of(Suite.load(root / "suite.yaml").check, shapes)
    assert len(lines) == 3
    assert "visual.new.7 … and 22 more (30 in all)" in lines[0]
    assert "visual.new.8," not in lines[0]


def test_experts_are_checked_without_reading_a_tensor(root: Path, monkeypatch: pytest.MonkeyPatch):
    from mergekit_vision.checkpoints import SafetensorsWeights, TorchWeights

    for kind in (SafetensorsWeights, TorchWeights):
        monkeypatch.setattr(kind, "_read", lambda self, name: pytest.fail("a tensor was read"))
    Suite.load(root / "suite.yaml").check(shapes_of(root), ["val"])


def test_classes_missing_from_suite_and_data(root: Path):
    content = content_of(root)
    del content["tasks"]["grays"]["classes"]
    content["tasks"]["grays"]["data"] = {"val": {"parquet": "data/none.parquet"}}
    lines = faults_of(Suite.load, rewrite(root, content))
    assert lines == [f"tasks.grays.classes: not given, and not found in the data: {root}/data/none.parquet: no such file"]


def test_each_task_may_need_other_splits(root: Path):
    (root / "data" / "grays" / "val.parquet").unlink()
    (root / "data" / "colors" / "test.parquet").unlink()
    suite = Suite.load(root / "suite.yaml")
    assert suite.faults(shapes_of(root), {"grays": ["test"], "colors": ["val"]}) == []
    (fault,) = suite.faults(shapes_of(root), {"grays": ["val", "test"]})
    assert fault.startswith("tasks.grays.data.val: ")
