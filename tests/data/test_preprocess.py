"""The two halves of open_clip's evaluation transform."""

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from tiny import picture

from mergekit_vision.data.preprocess import eval_transform

CONFIG = {"size": 16, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


@pytest.mark.parametrize("task", ["colors", "grays"])
@pytest.mark.parametrize("options", [{}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}])
def test_both_halves_are_open_clips_transform_bit_by_bit(task: str, options: dict[str, str]) -> None:
    ours, theirs = eval_transform(CONFIG | options), image_transform_v2(PreprocessCfg(**CONFIG, **options), is_train=False)
    images = [picture(task, 1, np.random.RandomState(seed)).convert("RGB") for seed in range(4)]
    pixels = torch.stack([ours.geometry(image) for image in images])
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (4, 3, 16, 16))
    assert torch.equal(ours.finish(pixels), torch.stack([theirs(image) for image in images]))
    assert pixels.dtype == torch.uint8, "in new memory"


def test_normalizing_does_not_wait_for_the_device() -> None:
    finish = eval_transform(CONFIG).to(torch.device("meta")).finish
    images = finish(torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device="meta"))  # where whatever reads a value fails
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), torch.float32)
