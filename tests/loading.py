"""What the data module reads, read plainly; and what it sees of the process it runs in."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import content_of, picture, write_file
from torch import Tensor

from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.suite import Suite


def whole_split(suite: Path, task: str, split: str) -> tuple[Tensor, Tensor]:
    """Reference: open_clip's own transform on every image, in order."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    loaded = Suite.load(suite)
    transform = image_transform_v2(PreprocessCfg(**describe_backbone(loaded.backbone, None).preprocess), is_train=False)
    source = open_source(loaded.tasks[task].data[split])
    images, labels = zip(*(source[index] for index in range(len(source))), strict=True)
    return torch.stack([transform(image) for image in images]), torch.tensor(labels)


def joined(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Images and labels of all batches."""
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def changed(root: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """The suite file of a directory after ``change`` to its tasks."""
    content = content_of(root)
    change(content["tasks"])
    return str(write_file(root, content))


def process(world: int = 1, rank: int = 0, devices: int = 1, device: str = "cpu") -> Any:
    """What the data module asks a trainer: how many processes there are, which this one is, and its device."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(world_size=world, global_rank=rank, num_devices=devices, strategy=strategy)


class Fetched:
    """A data set that would be downloaded when it is made."""

    made: list[tuple[str, str]] = []  # noqa: RUF012

    def __init__(self, task: str, split: str, labels: list[int]) -> None:
        self.made.append((task, split))
        self.targets = labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return picture("colors", 0, np.random.RandomState(index)), self.targets[index]


def fetched(task: str, split: str, labels: tuple[int, ...] = (0, 1)) -> dict[str, object]:
    """A source of such a data set."""
    return {"torchvision": f"{__name__}.Fetched", "args": {"task": task, "split": split, "labels": list(labels)}}


def all_fetched(root: Path) -> str:
    """The suite file, changed so that every split is downloaded."""
    Fetched.made.clear()

    def change(tasks: dict[str, Any]) -> None:
        for name, task in tasks.items():
            task["data"] = {split: fetched(name, split) for split in ("train", "val", "test")}

    return changed(root, change)
