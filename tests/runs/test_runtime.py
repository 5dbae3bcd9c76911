"""What is read off a trainer."""

from pathlib import Path

import lightning
import pytest
import torch

from mergekit_vision import InputError, VisionTasks
from mergekit_vision.runs.runtime import data_of, runtime_of


def trainer(tmp_path: Path, **options: object) -> lightning.Trainer:
    return lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, **options)


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_one_process_on_the_cpu(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    runtime = runtime_of(trainer(tmp_path, precision=precision))
    assert runtime.device == torch.device("cpu")
    assert (runtime.team.rank, runtime.team.size, runtime.precision_name) == (0, 1, precision)
    assert runtime.team.gather("value") == ["value"]
    with runtime.precision():
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype == dtype


def test_the_data_module_has_to_be_ours(tmp_path: Path) -> None:
    bare, data = trainer(tmp_path), VisionTasks("suite.yaml")
    with pytest.raises(InputError, match="the trainer's datamodule must be a VisionTasks"):
        data_of(bare)
    bare.datamodule = data
    assert data_of(bare) is data
    bare.datamodule = lightning.LightningDataModule()
    with pytest.raises(InputError, match="must be a VisionTasks"):
        data_of(bare)
