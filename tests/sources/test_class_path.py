"""Data set classes by their dotted path."""

import os
import struct
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from loopback_hub import LoopbackHub
from pictures import image, numbered
from PIL import Image
from published_hub import EMNIST, IMAGES, serve_emnist

from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import check_source, content_faults
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
    source = open_source({"torchvision": f"{__name__}.Squares", "args": {"root": str(tmp_path)}}, allow_code=True)
    assert (source.names, list(source.labels()), len(source)) == (("one", "two"), [0, 1, 0], 3)
    assert (source[1][0].mode, source[1][1]) == ("RGB", 1)
    with pytest.raises(InputError, match="download=True"):
        open_source({"torchvision": f"{__name__}.Squares", "args": {"root": "", "train": False}}, allow_code=True)


def test_torchvision_fingerprint_follows_the_files_under_root(tmp_path: Path) -> None:
    config = {"torchvision": f"{__name__}.Squares", "args": {"root": str(tmp_path / "data")}}
    found = [open_source(config, allow_code=True).fingerprint()]  # no such directory
    nested = tmp_path / "data" / "raw" / "x.bin"
    nested.parent.mkdir(parents=True)
    for content in ("a", "bb"):
        nested.write_text(content)
        found.append(open_source(config, allow_code=True).fingerprint())
    nested.rename(nested.with_name("y.bin"))
    found.append(open_source(config, allow_code=True).fingerprint())
    assert len(set(found)) == 4
    (nested.with_name("broken")).symlink_to(tmp_path / "nowhere")
    assert open_source(config, allow_code=True).fingerprint() == found[-1]


def test_a_class_of_a_user_is_known_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file, config = tmp_path / "own_pictures.py", {"torchvision": "own_pictures.Pictures"}
    code = "class Pictures:\n    targets = [0]\n    __len__ = lambda self: 1\n    __getitem__ = lambda self, index: {}\n"
    found = []
    for item in ("1", "1  # the same", "2"):
        file.write_text(code.format(item))
        found.append(open_source(config, allow_code=True).fingerprint())
    assert found[0] == found[1] != found[2]


def test_a_root_may_be_shared_by_classes_with_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, size in (("train", 2), ("t10k", 1)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, size, 28, 28) + bytes(784 * size))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, size) + bytes(size))
    (tmp_path / "data" / "dtd").mkdir()
    monkeypatch.chdir(tmp_path)
    configs = [
        {"torchvision": "torchvision.datasets.MNIST", "args": {"root": root, "train": False}}
        for root in (str(tmp_path / "data"), "data", "data/")
    ]
    before = [open_source(config).fingerprint() for config in configs]
    (tmp_path / "data" / "dtd" / "x.jpg").write_text("another data set's")
    assert [open_source(config).fingerprint() for config in configs] == before
    file = raw / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"1")
    os.utime(file, ns=(10**18, 10**18))
    assert not set(before) & {open_source(config).fingerprint() for config in configs}


class Pairs(Squares):
    """Keeps (file, label) pairs, as GTSRB does; decoding one is a mistake when only labels are asked for."""

    def __init__(self, root: str) -> None:
        self._samples = [("a.png", 1), ("b.png", 0), ("c.png", 1)]

    def __getitem__(self, index: int) -> tuple[Image.Image, torch.Tensor]:
        raise AssertionError("decoded")


def test_torchvision_labels_are_read_without_decoding() -> None:
    assert open_source({"torchvision": f"{__name__}.Pairs", "args": {"root": ""}}, allow_code=True).labels() == [1, 0, 1]


def test_a_download_of_torchvision_that_breaks_off_leaves_nothing(
    loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_emnist(loopback_hub, monkeypatch)
    args = {"root": str(tmp_path / "data"), "split": "digits", "train": False, "download": True}
    source = {"torchvision": "torchvision.datasets.EMNIST", "args": args}

    def break_off(archive: str, place: str) -> None:
        name = EMNIST.format(part="test", content="images-idx3")  # torchvision asks for no more than that it is there
        (Path(place) / name).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("torchvision.datasets.mnist.extract_archive", break_off)
        with pytest.raises(KeyboardInterrupt):
            open_source(source)
    assert list((tmp_path / "data").iterdir()) == []
    assert len(open_source(source)) == IMAGES["test"]
    loopback_hub.requests.clear()
    assert len(open_source({**source, "args": {**args, "train": True}})) == IMAGES["train"]
    assert loopback_hub.requests == []


def test_a_real_torchvision_data_set() -> None:
    source = open_source({"torchvision": "torchvision.datasets.FakeData", "args": {"size": 5, "image_size": [3, 8, 8]}})
    assert len(source) == len(source.labels()) == 5
    assert source[0][0].size == (8, 8)


def test_of_several_names_of_a_class_the_first_counts(tmp_path: Path) -> None:
    place = tmp_path / "imagenette2-160" / "train"
    for wnid in ("n01440764", "n02979186", "n03000684"):
        (place / wnid).mkdir(parents=True)
        image(1).save(place / wnid / "0.JPEG")
    source = open_source(
        {"torchvision": "torchvision.datasets.Imagenette", "args": {"root": str(tmp_path), "size": "160px", "split": "train"}}
    )
    assert source.names == ("tench", "cassette player", "chain saw")
    assert content_faults(source, ["tench", "cassette player", "chain saw"]) == []
    (fault,) = content_faults(source, ["cassette player", "tench", "chain saw"])
    assert "class 0 is `tench` in the data, but `cassette player`" in fault


def test_pets_are_of_breeds_or_cats_and_dogs(tmp_path: Path) -> None:
    place = tmp_path / "oxford-iiit-pet"
    for folder in ("images", "annotations"):
        (place / folder).mkdir(parents=True)
    pets = (("Bombay_1", 1, 1), ("beagle_7", 2, 2), ("pug_3", 3, 2))
    (place / "annotations" / "test.txt").write_text("".join(f"{name} {breed} {kind} 1\n" for name, breed, kind in pets))
    for name, *_ in pets:
        image(1).save(place / "images" / f"{name}.jpg")
    args = {"root": str(tmp_path), "split": "test"}
    breeds = open_source({"torchvision": "torchvision.datasets.OxfordIIITPet", "args": args})
    assert (breeds.names, breeds.labels()) == (("Bombay", "Beagle", "Pug"), [0, 1, 2])
    for kinds in ("binary-category", ["binary-category"]):
        source = open_source({"torchvision": "torchvision.datasets.OxfordIIITPet", "args": {**args, "target_types": kinds}})
        assert (source.names, source.labels()) == (("Cat", "Dog"), [0, 1, 1])
        assert [source[index][1] for index in range(3)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"torchvision": "torchvision.datasets.NoSuch"}, "give a class path like"),
        ({"torchvision": "MNIST"}, "give a class path like"),
        ({"torchvision": "os.system", "args": {"command": "true"}}, "--allow-code"),
        ({"torchvision": "torchvision.datasets.utils.download_url"}, "--allow-code"),
        ({"torchvision": "torchvision.datasets.MNIST"}, "missing a required argument: 'root'"),
        ({"torchvision": "torchvision.datasets.MNIST", "args": {"root": "x", "tran": True}}, "'tran'"),
    ],
)
def test_torchvision_is_checked_without_being_built(config: dict[str, object], hint: str) -> None:
    (fault,) = check_source(config, numbered(10))
    assert hint in fault
    arguments = {"root": "/nowhere", "download": True}
    assert check_source({"torchvision": "torchvision.datasets.MNIST", "args": arguments}, numbered(10)) == []


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "sys.exit", "evil.Images", f"{__name__}.Squares"])
def test_what_a_suite_names_is_not_imported_unless_it_is_registered(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"torchvision": path, "args": {"root": str(tmp_path)}}
    (fault,) = check_source(config, numbered(2))
    assert f"{path}: not a data set" in fault
    with pytest.raises(InputError, match="--allow-code"):
        open_source(config)
    assert "evil" not in sys.modules


def test_memory_that_runs_out_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> NoReturn:
        raise MemoryError

    source = open_source({"torchvision": "torchvision.datasets.FakeData", "args": {"size": 1}})
    monkeypatch.setattr("torchvision.datasets.FakeData.__getitem__", failing)
    with pytest.raises(MemoryError):
        source[0]


def test_a_function_is_not_called_even_where_code_is_allowed() -> None:
    with pytest.raises(InputError, match="not a class of map-style data sets"):
        open_source({"torchvision": "os.system", "args": {"command": "exit 3"}}, allow_code=True)


def test_an_entry_point_of_an_installed_package_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs.py").write_text("class Images(list):\n    classes = ['one']\n    targets = [0]\n")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mergekit_vision.datasets]\nTheirs = theirs:Images\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("Theirs", "theirs.Images"):
        assert len(open_source({"torchvision": path, "args": {}})) == 0
    sys.modules.pop("theirs")
