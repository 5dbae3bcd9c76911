"""Data set classes by their dotted path."""

from pathlib import Path

import pytest
import torch
from pictures import image, numbered
from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import check_source
from mergekit_vision.sources.opening import open_source


class Squares(torch.utils.data.Dataset):
    """A data set of a user's own, as torchvision's are."""

    classes = ["one", "two"]  # noqa: RUF012

    def __init__(self, root: str, train: bool = True) -> None:
        if not train:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.root, self.targets = root, torch.tensor([0, 1, 0])

    def __len__(self):
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, torch.Tensor]:
        return image(index, "L"), self.targets[index]


def test_torchvision_by_class_path(tmp_path: Path) -> None:
    source = open_source({"torchvision": f"{__name__}.Squares", "args": {"root": str(tmp_path)}})
    assert (source.names, list(source.labels()), len(source)) == (("one", "two"), [0, 1, 0], 3)
    assert (source[1][0].mode, source[1][1]) == ("RGB", 1)
    with pytest.raises(InputError, match="download=True"):
        open_source({"torchvision": f"{__name__}.Squares", "args": {"root": "", "train": False}})


def test_torchvision_fingerprint_follows_the_files_under_root(tmp_path: Path) -> None:
    config = {"torchvision": f"{__name__}.Squares", "args": {"root": str(tmp_path / "data")}}
    found = [open_source(config).fingerprint()]  # no such directory
    nested = tmp_path / "data" / "raw" / "x.bin"
    nested.parent.mkdir(parents=True)
    for content in ("a", "bb"):
        nested.write_text(content)
        found.append(open_source(config).fingerprint())
    nested.rename(nested.with_name("y.bin"))
    found.append(open_source(config).fingerprint())
    assert len(set(found)) == 4
    (nested.with_name("broken")).symlink_to(tmp_path / "nowhere")
    assert open_source(config).fingerprint() == found[-1]


class Pairs(Squares):
    """Keeps (file, label) pairs, as GTSRB does; decoding one is a mistake when only labels are asked for."""

    def __init__(self, root: str) -> None:
        self._samples = [("a.png", 1), ("b.png", 0), ("c.png", 1)]

    def __getitem__(self, index: int) -> tuple[Image.Image, torch.Tensor]:
        raise AssertionError("decoded")


def test_torchvision_labels_are_read_without_decoding() -> None:
    assert open_source({"torchvision": f"{__name__}.Pairs", "args": {"root": ""}}).labels() == [1, 0, 1]


def test_a_real_torchvision_data_set() -> None:
    source = open_source({"torchvision": "torchvision.datasets.FakeData", "args": {"size": 5, "image_size": [3, 8, 8]}})
    assert len(source) == len(source.labels()) == 5
    assert source[0][0].size == (8, 8)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"torchvision": "torchvision.datasets.NoSuch"}, "cannot be imported"),
        ({"torchvision": "MNIST"}, "give a class path like"),
        ({"torchvision": "torchvision.datasets.MNIST"}, "missing a required argument: 'root'"),
        ({"torchvision": "torchvision.datasets.MNIST", "args": {"root": "x", "tran": True}}, "'tran'"),
    ],
)
def test_torchvision_is_checked_without_being_built(config: dict[str, object], hint: str) -> None:
    (fault,) = check_source(config, numbered(10))
    assert hint in fault
    arguments = {"root": "/nowhere", "download": True}
    assert check_source({"torchvision": "torchvision.datasets.MNIST", "args": arguments}, numbered(10)) == []
