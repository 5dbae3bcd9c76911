"""The LightningModule used from Python."""

import json
from pathlib import Path

import lightning
import pytest
import torch

from mergekit_vision import InputError, MergedCLIP, MergeInputs, Merger, Trainer, VisionTasks, load
from mergekit_vision.merger import Merged
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic


class Counting(Merger):
    """Task arithmetic that says how often it merged, and observes what it is told to."""

    def __init__(self, observe: bool = False) -> None:
        self.observe = observe
        self._merges = 0
        self._rows: dict[str, int] = {}

    def merge(self, inputs: MergeInputs) -> Merged:
        self._merges += 1
        if self.observe:
            for task in inputs.tasks:
                inputs.observe(task, {inputs.linears[0]: lambda x, task=task: self._count(task, len(x))})
        return Merged({key: inputs.deltas(key).sum(0) for key in inputs.base}, scale=0.3)

    def _count(self, task: str, images: int) -> None:
        self._rows[task] = self._rows.get(task, 0) + images


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu")


def test_merges_once_for_search_validation_and_test(trainer: Trainer, tiny_suite: Path) -> None:
    merger = Counting()
    model, data = MergedCLIP(merger, scale="search"), VisionTasks(str(tiny_suite))
    trainer.validate(model, data)
    trainer.test(model, data)
    assert merger._merges == 1
    assert set(model.expert_accuracy) == {"val", "test"}


def test_proxies_run_in_batches_and_only_as_many_as_asked_for(trainer: Trainer, tiny_suite: Path) -> None:
    from mergekit_vision import Proxies

    merger = Counting(observe=True)
    trainer.test(MergedCLIP(merger), VisionTasks(str(tiny_suite), batch_size=4, proxies=Proxies(n=10)))
    assert set(merger._rows.values()) == {10}


def test_works_with_lightnings_own_trainer(tmp_path: Path, tiny_suite: Path) -> None:
    trainer = lightning.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)), verbose=False)
    assert json.loads((tmp_path / "results.json").read_text())["merger"]["name"] == "TaskArithmetic"


def test_saved_model_reproduces_the_logits_bit_for_bit(trainer: Trainer, tiny_suite: Path) -> None:
    model = MergedCLIP(ESM(), scale=0.7)
    trainer.merge(model, VisionTasks(str(tiny_suite)))
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load(trainer.default_root_dir)(images), model.encoder(images))


def test_the_backbone_is_what_coefficient_zero_gives(trainer: Trainer, tiny_suite: Path) -> None:
    import open_clip

    model = MergedCLIP(TaskArithmetic(), scale=0.0)
    data = VisionTasks(str(tiny_suite))
    trainer.merge(model, data)
    backbone = open_clip.create_model(data.suite.backbone).eval()
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(images), backbone.encode_image(images), rtol=1e-5, atol=1e-6)


def test_a_proxy_batch_size_changes_nothing(tmp_path: Path, tiny_suite: Path) -> None:
    encoders = []
    for batch_size in (3, 64):
        model = MergedCLIP(ESM())
        Trainer(default_root_dir=str(tmp_path), accelerator="cpu").merge(
            model, VisionTasks(str(tiny_suite), batch_size=batch_size)
        )
        encoders.append(model.encoder.weights())
    for key, value in encoders[0].items():
        torch.testing.assert_close(encoders[1][key], value, rtol=1e-4, atol=1e-6)


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="one of"):
        MergedCLIP()
    with pytest.raises(InputError, match="one of"):
        MergedCLIP(ESM(), merged="somewhere")
    with pytest.raises(InputError, match="in its weights"):
        MergedCLIP(merged="somewhere", scale=0.5)


def test_needs_its_own_data_module(trainer: Trainer) -> None:
    with pytest.raises(InputError, match="VisionTasks"):
        trainer.test(MergedCLIP(TaskArithmetic()), lightning.LightningDataModule())
