"""Exports of real experts' merged models: predictions on real images."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exports import READERS, without_this_package
from torch import Tensor
from torch.nn import functional as F

from mergekit_vision import MergedCLIP, Trainer, VisionTasks, load
from mergekit_vision.encoders.backbone import load_clip, load_tokenizer
from mergekit_vision.encoders.heads import zero_shot_head
from mergekit_vision.export.exporting import export_model
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP

PER_TASK = 125


@pytest.fixture(scope="module")
def models(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The zoo merged by ESM or ESM++, once: directory of the model."""
    root = tmp_path_factory.mktemp("zoo")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            trainer = Trainer(default_root_dir=str(root / name), accelerator="cpu")
            trainer.merge(MergedCLIP({"ESM": ESM(), "ESMPP": ESMPP()}[name]), VisionTasks(str(zoo / "suite.yaml")))
        return root / name

    return directory


@pytest.fixture(scope="module")
def tasks(zoo: Path) -> list[tuple[Tensor, Tensor]]:
    """Test images and zero-shot head of each task."""
    data = VisionTasks(str(zoo / "suite.yaml"), batch_size=PER_TASK)
    clip, tokenizer = load_clip(f"local-dir:{zoo / 'base'}"), load_tokenizer(f"local-dir:{zoo / 'base'}")
    images = [next(iter(loader))[0] for loader in data.test_dataloader()]
    prompts = [(task.classes, task.templates) for task in data.suite.tasks.values()]
    return [(x.float(), zero_shot_head(clip, tokenizer, *words)) for x, words in zip(images, prompts, strict=True)]


def predictions(embed: Callable[[Tensor], Tensor], tasks: list[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([(F.normalize(embed(images), dim=-1) @ head.T).argmax(1) for images, head in tasks])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to"),
    [("ESM", "huggingface"), ("ESM", "open_clip"), ("ESM", "onnx"), ("ESM", "torch"), ("ESMPP", "onnx"), ("ESMPP", "torch")],
)
def test_a_thousand_predictions(
    name: str, to: str, models: Callable[[str], Path], tasks: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    expected = predictions(load(models(name)), tasks)
    difference = export_model(models(name), to, tmp_path / "out")
    with without_this_package(*([] if to == "open_clip" else ["open_clip"])):
        found = predictions(READERS[to](tmp_path / "out"), tasks)
    assert len(found) == 1000
    equal = int((found == expected).sum())
    print(f"{name} {to}: {equal} of {len(found)} predictions equal, embeddings agree to {difference:.1e}")
    assert equal >= 999
