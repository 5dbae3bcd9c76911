"""The trainer's commands: what they open, what they refuse, and that they leave the process as it was."""

import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_vision.checkpoints
from mergekit_vision import InputError, MergedCLIP, Trainer, VisionTasks
from mergekit_vision.encoders import backbone
from mergekit_vision.export.manifest import read_record
from mergekit_vision.merger import Merger
from mergekit_vision.merging import workbench
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.suites.suite import Suite


@pytest.mark.parametrize("merger", [TaskArithmetic(), ESMPP(rank=2)], ids=lambda merger: type(merger).__name__)
def test_a_merge_opens_each_file_once_and_builds_no_heads(
    tiny_suite: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, merger: Merger
) -> None:
    opened: list[Path] = []
    read: list[str] = []
    expert, clip = mergekit_vision.checkpoints.open_expert, backbone.load_clip
    monkeypatch.setattr("mergekit_vision.suites.suite.open_expert", lambda at: opened.append(at.path) or expert(at))
    for module in (workbench, backbone):
        monkeypatch.setattr(module, "load_clip", lambda name, tag=None: read.append(name) or clip(name, tag))
    monkeypatch.setattr("mergekit_vision.export.directory.load_clip", lambda *_: pytest.fail("read again to be saved"))
    data = VisionTasks(str(tiny_suite))
    Trainer(default_root_dir=str(tmp_path), accelerator="cpu").merge(MergedCLIP(merger), data)
    assert sorted(opened) == sorted(task.expert.path for task in data.suite.tasks.values())
    assert read == [data.suite.backbone]
    assert not (cache / "heads").exists()
    assert (tmp_path / "open_clip_model.safetensors").is_file()


def test_what_is_merged_already_is_not_merged(tiny_suite: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="merge needs `merger`") as caught:
        Trainer(default_root_dir=str(tmp_path)).merge(MergedCLIP(merged=str(tmp_path)), VisionTasks(str(tiny_suite)))
    assert caught.value.of == "model"


def test_a_trainer_leaves_log_levels_and_warnings_as_they_were(tiny_suite: Path, tmp_path: Path) -> None:
    names = ("", "lightning", "lightning.pytorch", "lightning.fabric", "mergekit_vision")
    before = [logging.getLogger(name).level for name in names], list(warnings.filters), logging.root.manager.disable
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu")
    trainer.test(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)))
    after = [logging.getLogger(name).level for name in names], list(warnings.filters), logging.root.manager.disable
    assert after == before


def test_a_run_prints_nothing_unless_logging_is_configured(
    tiny_suite: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu")
    trainer.test(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)))
    assert capfd.readouterr().out == ""


def test_results_of_an_earlier_model_are_not_taken_for_the_new_ones(
    tiny_suite: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "results.json").write_text("{}")
    with caplog.at_level("INFO", logger="mergekit_vision"):
        Trainer(default_root_dir=str(tmp_path), accelerator="cpu").merge(
            MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite))
        )
    assert "results.json was there before: it is not about this model" in caplog.text


def test_what_was_read_of_each_expert_is_recorded(tiny_suite: Path, tmp_path: Path) -> None:
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu", devices=1)
    trainer.merge(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)))
    sources, tasks = read_record(tmp_path)["sources"], Suite.load(tiny_suite).tasks
    assert list(sources) == list(tasks)
    for task, source in sources.items():
        file = tasks[task].expert.path
        assert source["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
        assert (source["kind"], source["family"]) == ("weights", "open_clip")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_float32_is_float32_in_convolutions_too(precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where evaluation is not: proxy images run in float32 at any precision."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Trainer(default_root_dir=str(tmp_path), accelerator="cpu", precision=precision)
    assert not torch.backends.cudnn.allow_tf32
