"""``mergekit-vision plan``."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from loopback_hub import LoopbackHub, point_at
from suite_notes import texts_of
from tiny import SIZES, TASKS, content_of, write_file

from mergekit_vision import Merger
from mergekit_vision.cli.main import main
from mergekit_vision.merging.speed import Speed
from mergekit_vision.merging.work import Unit
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.trim import Trim
from mergekit_vision.runs import planning
from mergekit_vision.suites.catalog import PublishedSuite, published
from mergekit_vision.suites.suite import Suite

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that takes a nanosecond for one of anything."""
    speed = Speed(dict.fromkeys(get_args(Unit), 1e-9), 1e-9)
    monkeypatch.setattr(planning, "measure", lambda *_, **__: speed)
    monkeypatch.setattr(planning, "decoding_seconds", lambda *_, **__: 1e-9)


def planned(place: Path, *arguments: object, status: int = 0) -> dict[str, Any]:
    """What ``plan.json`` holds."""
    assert main(["plan", "-o", str(place), *map(str, arguments)]) == status
    found: dict[str, Any] = json.loads((place / "plan.json").read_text())
    return found


@pytest.mark.usefixtures("measured")
def test_all_published_suites_without_a_request(
    loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(loopback_hub, tmp_path / "home", monkeypatch)
    for name in published():
        found = planned(tmp_path, "-s", name, "--mergers", "[ESM, TIES]")
        suite = PublishedSuite.load(name)
        assert (found["kind"], found["schema"], found["suite"], found["faults"]) == ("plan", 1, name, [])
        assert list(found["tasks"]) == list(suite.tasks)
        for task, facts in suite.tasks.items():
            assert _images(found, task) == {"test": facts.images["test"], **_divided(name, facts.images["train"])}
            assert not found["tasks"][task]["expert"]["here"]
        assert not found["backbone"]["here"]
        assert found["bytes"]["download"] == found["backbone"]["bytes"] + round(suite.expert_gb * 1e9) * len(suite.tasks)
        assert found["estimate"]["methods"].keys() == {"ESM", "TIES"}
    assert loopback_hub.requests == []


def _images(found: dict[str, Any], task: str) -> dict[str, int]:
    return {split: data["images"] for split, data in found["tasks"][task]["data"].items()}


def _divided(name: str, images: int) -> dict[str, int]:
    val = images // 10 if name.startswith("fusion_bench") else min(images // 10, 5000)
    return {"val": val, "train": images - val}


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("name", [name for name in published() if name.endswith("-20")])
def test_texts_are_those_of_the_notes(name: str, tmp_path: Path) -> None:
    for task, facts in planned(tmp_path, "-s", name, "--mergers", "Average")["tasks"].items():
        texts = texts_of(name.split("/")[0], task)
        assert {key: facts[key] for key in ("classes", "templates")} == texts, task


def test_a_suite_on_this_machine(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path / "new", "-s", root / "suite.yaml", "--mergers", "[TSVM, ESM]", "--proxies", "4")
    for name, (classes, templates) in TASKS.items():
        task = found["tasks"][name]
        assert (task["classes"], task["templates"]) == (list(classes), list(templates))
        assert _images(found, name) == SIZES
        assert task["expert"]["here"]
        assert task["expert"]["bytes"] == Path(task["expert"]["place"]).stat().st_size
        assert all(data["here"] and data["bytes"] > 0 for data in task["data"].values())
    assert (found["bytes"]["download"], found["bytes"]["unknown"], found["faults"]) == (0, [], [])
    for costs in found["estimate"]["methods"].values():
        assert all(0 < costs[part] < 1000 for part in ("merge", "search", "evaluation"))
        assert costs["peak_bytes"] > 100 << 20
    assert all(seconds > 0 for seconds in found["estimate"]["once"].values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*TASKS, "TSVM", "ESM"))


@pytest.mark.usefixtures("measured")
def test_the_search_of_a_base_is_counted(root: Path, tmp_path: Path) -> None:
    found = planned(tmp_path, "-s", root / "suite.yaml", "--mergers", "[ESM, ESMPP, SMILE, FeatCal, RegMean]")
    searches = {name: costs["search"] for name, costs in found["estimate"]["methods"].items()}
    assert searches["ESM"] == searches["ESMPP"] == searches["FeatCal"] > 0
    assert searches["SMILE"] == searches["RegMean"] == 0


@pytest.mark.usefixtures("measured")
def test_every_fault_is_told_at_once_and_what_can_be_is_planned(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = content_of(root)
    content["tasks"]["colors"]["expert"] = "experts/none.safetensors"
    content["tasks"]["grays"]["data"]["test"] = {"parquet": "data/none.parquet"}
    del content["tasks"]["stripes"]["data"]["val"]
    (root / "experts" / "stripes.safetensors").write_bytes(b"nothing")
    found = planned(tmp_path, "-s", write_file(root, content), "--mergers", "ESM", status=1)
    keys = ["tasks.colors.expert", "tasks.grays.data.test", "tasks.stripes.expert", "tasks.stripes.data.val"]
    assert [fault.split(":")[0] for fault in found["faults"]] == keys
    error = capsys.readouterr().err
    assert "4 faults" in error
    assert all(key in error for key in keys)
    assert found["tasks"]["grays"]["data"]["test"]["images"] is None
    assert found["estimate"]["methods"]["ESM"]["evaluation"] is None


@pytest.mark.parametrize(
    ("merger", "faults"), [(SMILE(), []), (SMILE(rule="sim"), ["val"]), (Trim(base=ESM()), ["val"])], ids=repr
)
def test_val_may_be_missing_where_no_method_looks_at_images(root: Path, merger: Merger, faults: list[str]) -> None:
    content = content_of(root)
    del content["tasks"]["stripes"]["data"]["val"]
    found = planning.Planning(Suite.load(write_file(root, content)), {"method": merger}, planning.Options()).faults()
    assert [fault.split(":")[0] for fault in found] == [f"tasks.stripes.data.{split}" for split in faults]


@pytest.mark.usefixtures("measured")
def test_methods_of_others_are_planned_but_for_their_merge(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign.py").write_text(
        "from mergekit_vision.plugins.average import Average\nclass Foreign(Average):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = planned(tmp_path, "-s", root / "suite.yaml", "--mergers", "foreign.Foreign")["estimate"]["methods"]["Foreign"]
    assert found["merge"] is None
    assert found["evaluation"] > 0


@pytest.mark.usefixtures("measured")
def test_methods_are_listed_as_for_compare(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In YAML; their modules may lie beside the user."""
    (tmp_path / "median_here.py").write_text(
        "from mergekit_vision.plugins.average import Average\nclass Median(Average):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    for mergers in ('["TIES", ESM]', "TIES, ESM", "[TIES,\n ESM]"):
        assert planned(tmp_path, "-s", root / "suite.yaml", "--mergers", mergers)["estimate"]["methods"].keys() == {"TIES", "ESM"}
    found = planned(tmp_path, "-s", root / "suite.yaml", "--mergers", "[median_here.Median, TIES]")["estimate"]["methods"]
    assert found.keys() == {"Median", "TIES"}
    assert sys.path == path


@pytest.mark.usefixtures("measured")
def test_a_backbone_that_is_not_here_leaves_times_out(root: Path, tmp_path: Path) -> None:
    content = {**content_of(root), "backbone": "hf-hub:org/none"}
    found = planned(tmp_path, "-s", write_file(root, content), "--mergers", "ESM")
    assert found["estimate"] is None
    assert not found["backbone"]["here"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["-s", "tall/ViT-B-32"], "did you mean `tall/ViT-B-32-8`"),
        (["-s", "demo", "--mergers", "ESN"], "Did you mean ESM?"),
        (["-s", "demo", "--proxies", "0"], "--proxies must be 1 or more"),
        ([], "--suite"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert hint in err
