"""Checks of a suite's experts and data against its backbone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from suite_faults import faults_of
from tiny import content_of, write_file, write_parquet

from mergekit_vision.checkpoints import CheckpointWeights, open_weights
from mergekit_vision.suites.checks import check_suite, suite_faults
from mergekit_vision.suites.suite import Suite


def shapes_of(root: Path) -> dict[str, tuple[int, ...]]:
    return open_weights(root / "base" / "open_clip_model.safetensors").shapes


def test_sound_suites_pass(tiny_suite: Path, zoo: Path) -> None:
    for path in (tiny_suite, zoo / "suite.yaml"):
        check_suite(Suite.load(path), shapes_of(path.parent), {"val", "test"})


def test_every_fault_of_experts_and_data_is_listed(root: Path) -> None:
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
    suite = Suite.load(write_file(root, content))
    lines = faults_of(check_suite, suite, shapes_of(root), ["val", "test"])
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
    without = faults_of(check_suite, suite, shapes_of(root), ["test"], False)
    assert [line.split(":")[0] for line in without] == ["tasks.colors.data.test", "tasks.grays.data.test"]


def test_long_lists_of_keys_are_shortened(root: Path) -> None:
    shapes = {**shapes_of(root), **{f"visual.new.{i}": (1,) for i in range(30)}}
    (line,) = faults_of(check_suite, Suite.load(root / "suite.yaml"), shapes)  # once, and not for each expert
    assert line.startswith("backbone: each expert lacks visual.new.0, ")
    assert "visual.new.7 … and 22 more (30 in all)" in line
    assert "visual.new.8," not in line


def test_what_one_expert_alone_lacks_is_told_of_it(root: Path) -> None:
    weights = dict(open_weights(root / "experts" / "colors.safetensors"))
    del weights["visual.proj"]
    save_file(weights, root / "experts" / "colors.safetensors")
    (line,) = faults_of(check_suite, Suite.load(root / "suite.yaml"), shapes_of(root))
    assert line.startswith("tasks.colors.expert: ")


def test_experts_are_checked_without_reading_a_tensor(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointWeights, "__getitem__", lambda self, key: pytest.fail("a tensor was read"))
    check_suite(Suite.load(root / "suite.yaml"), shapes_of(root), ["val"])


def test_each_task_may_need_other_splits(root: Path) -> None:
    (root / "data" / "grays" / "val.parquet").unlink()
    (root / "data" / "colors" / "test.parquet").unlink()
    suite = Suite.load(root / "suite.yaml")
    assert suite_faults(suite, shapes_of(root), {"grays": ["test"], "colors": ["val"]}) == []
    (fault,) = suite_faults(suite, shapes_of(root), {"grays": ["val", "test"]})
    assert fault.startswith("tasks.grays.data.val: ")
