"""Data set classes that a suite names: none runs code of a file, and none that cannot be used is more than one line."""

from typing import Any

import pytest

from mergekit_vision.errors import InputError
from mergekit_vision.sources.opening import open_source

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unpickles a file of the working directory": ("datasets.LSUN", {"root": "/proc/self/cwd/x"}, "so it is not imported"),
    "unpickles it for one class": ("datasets.LSUNClass", {"root": "/proc/self/cwd/x"}, "so it is not imported"),
    "a module in between": ("datasets.folder.os.system", {"command": "touch ran"}, "so it is not imported"),
    "no data set": ("transforms.Resize", {"size": 3}, "so it is not imported"),
    "only the beginning of one": ("datasets.VisionDataset", {"root": "x"}, "NotImplementedError"),
    "more images than there are": ("datasets.FakeData", {"size": 10**12}, "has 1000000000000 images, and"),
    "less than no images": ("datasets.FakeData", {"size": -1}, "should return >= 0"),
    "an unknown argument": ("datasets.MNIST", {"nosuch": 1}, "missing a required argument: 'root' (`args` holds nosuch)"),
    "too few arguments": ("datasets.Kinetics", {"root": "x"}, "missing a required argument: 'frames_per_clip'"),
    "a number as its directory": ("datasets.ImageFolder", {"root": 3}, "datasets.ImageFolder: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_class_that_cannot_be_used_is_one_line(case: str) -> None:
    name, args, message = REFUSED[case]
    with pytest.raises(InputError) as caught:
        open_source({"torchvision": f"torchvision.{name}", "args": args})
    assert str(caught.value).startswith(f"torchvision.{name}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
