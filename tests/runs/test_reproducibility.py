"""The same command twice, and with another number of threads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_vision import MergedCLIP, Trainer, VisionTasks
from mergekit_vision.merger import Merger
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.tsvm import TSVM


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads is as it was after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def without_times(path: Path) -> dict[str, Any]:
    """A record without times, and without the hashes of what holds times: of itself and of the model card."""
    content: dict[str, Any] = json.loads(path.read_text())
    content.get("files", {}).pop("README.md", None)
    return {key: value for key, value in content.items() if key not in ("seconds", "sha256")}


@pytest.mark.parametrize("merger", [TSVM, pytest.param(ESMPP, marks=pytest.mark.slow)])
def test_the_same_run_twice_writes_the_same_bytes(merger: type[Merger], tiny_suite: Path, tmp_path: Path) -> None:
    for place in ("one", "two"):
        model = MergedCLIP(merger(), scale="search")
        data = VisionTasks(str(tiny_suite))
        trainer = Trainer(default_root_dir=str(tmp_path / place), accelerator="cpu", devices=1)
        trainer.merge(model, data)
        trainer.test(model, data)
    one, two = ({path.name: path for path in (tmp_path / place).iterdir()} for place in ("one", "two"))
    assert one.keys() == two.keys()
    assert "open_clip_model.safetensors" in one
    for name, path in one.items():
        if name in ("results.json", "merge.json"):
            assert without_times(path) == without_times(two[name])
        elif name != "README.md":  # whose times differ
            assert path.read_bytes() == two[name].read_bytes(), name


def logits(merger: Merger, place: Path, threads: int) -> dict[str, Tensor]:
    """Task -> logits ``[N, classes]`` of the test images of the demo's first tasks, merged and run by some threads."""
    torch.set_num_threads(threads)
    model, data = MergedCLIP(merger), VisionTasks("demo", tasks=["digits", "shapes"])
    Trainer(default_root_dir=str(place), accelerator="cpu", devices=1).merge(model, data)
    with torch.inference_mode():
        return {
            task: torch.cat([model(images, task) for images, _ in loader])
            for task, loader in zip(data.task_names, data.test_dataloader(), strict=True)
        }


@pytest.mark.parametrize("merger", [TSVM(), pytest.param(ESM(), marks=pytest.mark.slow)], ids=["TSVM", "ESM"])
def test_threads_change_no_prediction(merger: Merger, threads: None, tmp_path: Path) -> None:
    """Logits differed by at most 6e-6 when this was measured, where the two best of an image differed by 3e-4 or more."""
    one, two = (logits(merger, tmp_path / str(number), number) for number in (1, 2))
    for task, expected in one.items():
        assert two[task].argmax(-1).equal(expected.argmax(-1))
