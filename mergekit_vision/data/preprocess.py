"""The backbone's evaluation transform, cut in two where the data is smallest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """open_clip's evaluation transform, cut in two where the data is smallest.

    One after the other, the two parts give bit by bit what the whole transform gives.

    Attributes:
        geometry: one PIL image -> its resized pixels, uint8 ``[3, H, W]``.
        mean: the model's mean of each channel, float32 ``[3, 1, 1]``.
        std: the deviation, likewise.
        max_pixel: what divides pixels into [0, 1]: 255. As a tensor, since CUDA multiplies by the rounded reciprocal of a number.
    """

    geometry: Callable[[Any], Tensor]
    mean: Tensor
    std: Tensor
    max_pixel: Tensor = field(default_factory=lambda: torch.tensor(255.0))

    def to(self, device: torch.device) -> "Preprocess":
        """The same with :meth:`finish` on a device."""
        return Preprocess(self.geometry, self.mean.to(device), self.std.to(device), self.max_pixel.to(device))

    def finish(self, pixels: Tensor) -> Tensor:
        """Normalized float32 images of uint8 pixels ``[…, 3, H, W]``, in new memory on the same device."""
        # torchvision's Normalize takes twice the passes over memory, and reads the deviation back from the device
        return pixels.to(torch.float32).div_(self.max_pixel).sub_(self.mean).div_(self.std)


def eval_transform(config: Mapping[str, Any]) -> Preprocess:
    """The evaluation transform of open_clip's ``preprocess_cfg``."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose, PILToTensor

    *geometry, _, normalize = image_transform_v2(PreprocessCfg(**config), is_train=False).transforms
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (normalize.mean, normalize.std))
    return Preprocess(Compose([*geometry, PILToTensor()]), mean, std)
