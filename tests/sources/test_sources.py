import json
import multiprocessing
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import encoded
from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import check_source, content_faults
from mergekit_vision.sources.config import config_faults, resolve
from mergekit_vision.sources.folder import FlatFolder
from mergekit_vision.sources.opening import open_source
from mergekit_vision.sources.parquet import ParquetImages, _images


def numbered(classes: int) -> list[str]:
    """Names that no data uses."""
    return [f"class {number}" for number in range(classes)]


def image(value: int, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (4, 3), (value, 2 * value, 100)).convert(mode)


def table(
    values: list[object], labels: list[object], names: list[str] | None = None, label_type: pa.DataType | None = None
) -> pa.Table:
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [value if isinstance(value, dict) else {"bytes": value, "path": None} for value in values]
    made = pa.table({"image": pa.array(cells, cell), "label": pa.array(labels, label_type or pa.int64())})
    if names is None:
        return made
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(info)})


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Three files of 5, 0 and 4 images in row groups of 2; image i has red = i and label i % 3."""
    for number, rows in enumerate(([0, 1, 2, 3, 4], [], [5, 6, 7, 8])):
        data = table([encoded(image(i)) for i in rows], [i % 3 for i in rows], ["a", "b", "c"])
        pq.write_table(data, tmp_path / f"test-0000{number}.parquet", row_group_size=2)
    return tmp_path / "test-*.parquet"


def test_parquet_glob_in_any_order(parquet: Path):
    source = open_source({"parquet": str(parquet)})
    assert len(source) == 9
    assert source.names == ("a", "b", "c")
    assert list(source.labels()) == [i % 3 for i in range(9)]
    for index in (8, 0, 4, 5, 3, 1, 7, 2, 6):
        picture, label = source[index]
        assert (picture.mode, picture.size, label) == ("RGB", (4, 3), index % 3)
        assert picture.getpixel((0, 0)) == (index, 2 * index, 100)
    with pytest.raises(IndexError):
        source[9]


def test_parquet_reads_each_row_group_once_in_order_and_keeps_few(parquet: Path):
    _images.cache_clear()
    source = ParquetImages(str(parquet))
    for index in range(9):
        source[index]
    counts = _images.cache_info()
    assert (counts.misses, counts.currsize) == (5, 2)


def _first_red(source, results):
    results.put(source[8][0].getpixel((0, 0))[0])


def test_parquet_survives_pickling_and_a_fork(parquet: Path):
    source = ParquetImages(str(parquet))
    source[0]
    assert pickle.loads(pickle.dumps(source))[8][1] == 2
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_first_red, args=(source, results))
    process.start()
    assert results.get(timeout=60) == 8
    process.join()


def test_a_rewritten_file_is_not_served_from_memory(tmp_path: Path):
    path = tmp_path / "x.parquet"
    for value in (10, 20):
        pq.write_table(table([encoded(image(value))], [0]), path)
        assert ParquetImages(path)[0][0].getpixel((0, 0))[0] == value


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str):
    picture = image(50, mode)
    name = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    picture.save(name)
    pq.write_table(table([name.read_bytes()], [0]), tmp_path / "x.parquet")
    found = ParquetImages(tmp_path / "x.parquet")[0][0]
    assert found.mode == "RGB"
    with Image.open(name) as again:
        assert np.array_equal(np.asarray(found), np.asarray(again.convert("RGB")))


def test_a_damaged_image_is_named_by_file_and_row(tmp_path: Path):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40, 3), np.uint8))
    whole = encoded(noise)
    values = [
        whole,
        whole,
        b"no image",
        whole[: len(whole) // 2],
        {"bytes": None, "path": None},
        {"bytes": None, "path": "b.png"},
    ]
    pq.write_table(table(values, [0] * 6), tmp_path / "x.parquet", row_group_size=2)
    source = ParquetImages(tmp_path / "x.parquet")
    source[1]
    for row in (2, 3, 4, 5):
        with pytest.raises(InputError, match=rf"x\.parquet, row {row}: "):
            source[row]
    noise.save(tmp_path / "b.png")
    assert np.array_equal(np.asarray(source[5][0]), np.asarray(noise))


def test_parquet_columns(tmp_path: Path):
    path = tmp_path / "x.parquet"
    data = table([encoded(image(1))], [3], label_type=pa.uint8()).rename_columns(["img", "fine"])
    pq.write_table(data, path)
    assert open_source({"parquet": str(path), "image": "img", "label": "fine"})[0][1] == 3
    with pytest.raises(InputError, match=r"no column 'image' or 'label' among img, fine; name the columns by `image:`"):
        ParquetImages(path)
    with pytest.raises(InputError, match="'fine' is uint8, not encoded images"):
        ParquetImages(path, image="fine", label="fine")
    pq.write_table(pa.table({"image": [encoded(image(1))], "label": ["cat"]}), path)
    with pytest.raises(InputError, match="'label' is string, not integer"):
        ParquetImages(path)
    pq.write_table(pa.table({"image": [encoded(image(7))], "label": [1]}), path)  # plain bytes
    assert ParquetImages(path)[0][0].getpixel((0, 0)) == (7, 14, 100)


def test_parquet_of_several_kinds_is_refused(tmp_path: Path):
    pq.write_table(table([encoded(image(1))], [0], ["a"]), tmp_path / "1.parquet")
    pq.write_table(table([encoded(image(1))], [0], ["b"]), tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"2\.parquet: names other classes than .*1\.parquet"):
        open_source({"parquet": str(tmp_path / "*.parquet")})


@pytest.mark.parametrize("statistics", [True, False])
def test_label_range_with_and_without_statistics(tmp_path: Path, statistics: bool):
    path = tmp_path / "x.parquet"
    data = table([encoded(image(i)) for i in range(5)], [4, 2, -1, 3, 3])
    pq.write_table(data, path, row_group_size=2, write_statistics=statistics)
    assert ParquetImages(path).label_range() == (-1, 4)
    config = {"parquet": str(path)}
    assert check_source(config, numbered(5)) == ["labels run from -1 to 4, but with 5 classes they must lie in 0 to 4"]
    pq.write_table(table([encoded(image(1))] * 2, [0, 4]), path, write_statistics=statistics)
    assert check_source(config, numbered(5)) == []
    assert "labels run from 0 to 4" in check_source(config, numbered(4))[0]
    pq.write_table(table([encoded(image(1))] * 2, [0, None]), path, write_statistics=statistics)
    assert "1 rows have no 'label'" in check_source(config, numbered(5))[0]
    pq.write_table(table([], []), path)
    assert check_source(config, numbered(5)) == ["holds no images"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of two classes with 2 and 1 images."""
    for number, name in enumerate(("cat/1.png", "cat/2.png", "ant/1.jpg")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        image(10 * number, "L").save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("classes", "exact", "message"),
    [
        (["ant", "cat"], True, None),
        (["ant", "feline"], False, None),  # a better name for the prompts
        (["insect", "feline"], False, None),
        (["ant", "feline"], True, "class 1 is `cat` in the data, but `feline` in the task's first split; `feline` missing here"),
        (["cat", "ant"], False, "class 0 is `ant` in the data, but `cat` under `classes`; list them in the order of the data"),
        (["bee", "ant"], False, "class 0 is `ant` in the data, but `bee` under `classes`; `bee` missing here; list them"),
        (["ant", "bee", "cat"], True, "has 2 classes, but there are 3 in the task's first split; `bee` missing here"),
        (["ant", "bee", "cat"], False, "has 2 classes, but there are 3 under `classes`; `bee` missing here"),
    ],
)
def test_a_name_stands_for_one_class_everywhere(folder: Path, classes: list[str], exact: bool, message: str | None):
    faults = check_source({"folder": str(folder)}, classes, exact)
    assert not faults if message is None else message in faults[0]


def test_image_folder(folder: Path):
    source = open_source({"folder": str(folder)})
    assert (source.names, list(source.labels()), len(source)) == (("ant", "cat"), [0, 1, 1], 3)
    assert source[2][0].mode == "RGB"
    assert check_source({"folder": str(folder)}, numbered(2)) == []
    assert check_source({"folder": str(folder)}, numbered(3)) == ["the data has 2 classes, but there are 3 under `classes`"]
    (folder / "cat" / "2.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"cat/2\.png: not a readable image"):
        source[2]
    with pytest.raises(InputError, match="nowhere: not an image folder"):
        open_source({"folder": str(folder / "nowhere")})


def test_flat_folder(folder: Path):
    (folder / "cat" / "notes.txt").write_text("")
    source = FlatFolder(folder / "cat")
    assert [path.name for path in source.paths] == ["1.png", "2.png"]
    assert [source[index][1] for index in range(len(source))] == [0, 1]
    assert source[0][0].mode == "RGB"
    assert FlatFolder(folder / "cat" / "2.png").paths == (folder / "cat" / "2.png",)
    assert isinstance(open_source({"folder": str(folder / "cat")}, labeled=False), FlatFolder)
    for place in (folder, folder / "none"):
        with pytest.raises(InputError, match=str(place)):
            FlatFolder(place)


class Squares(torch.utils.data.Dataset):
    """A data set of a user's own, as torchvision's are."""

    classes = ["one", "two"]  # noqa: RUF012

    def __init__(self, root: str, train: bool = True):
        if not train:
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.root, self.targets = root, torch.tensor([0, 1, 0])

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return image(index, "L"), self.targets[index]


def test_torchvision_by_class_path(tmp_path: Path):
    source = open_source({"torchvision": f"{__name__}.Squares", "args": {"root": str(tmp_path)}})
    assert (source.names, list(source.labels()), len(source)) == (("one", "two"), [0, 1, 0], 3)
    assert (source[1][0].mode, source[1][1]) == ("RGB", 1)
    with pytest.raises(InputError, match="download=True"):
        open_source({"torchvision": f"{__name__}.Squares", "args": {"root": "", "train": False}})


def test_torchvision_fingerprint_follows_the_files_under_root(tmp_path: Path):
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

    def __getitem__(self, index):
        raise AssertionError("decoded")


def test_torchvision_labels_are_read_without_decoding():
    assert open_source({"torchvision": f"{__name__}.Pairs", "args": {"root": ""}}).labels() == [1, 0, 1]


def test_a_real_torchvision_data_set():
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
def test_torchvision_is_checked_without_being_built(config: dict[str, object], hint: str):
    (fault,) = check_source(config, numbered(10))
    assert hint in fault
    arguments = {"root": "/nowhere", "download": True}
    assert check_source({"torchvision": "torchvision.datasets.MNIST", "args": arguments}, numbered(10)) == []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the hub's layout with two splits; the third image of ``test`` is damaged."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    place = tmp_path / "toy" / "data"
    place.mkdir(parents=True)
    values = [encoded(image(1, "L")), encoded(image(2)), b"no image"]
    pq.write_table(table(values, [1, 0, 1], ["x", "y"]), place / "test-00000-of-00001.parquet")
    pq.write_table(table(values[:1], [0], ["x", "y"]), place / "train-00000-of-00001.parquet")
    return tmp_path / "toy"


def test_hub_layout_offline(hub: Path):
    config = {"hub": str(hub), "split": "test"}
    assert check_source(config, numbered(2)) == []
    source = open_source(config)
    assert (source.names, list(source.labels()), len(source)) == (("x", "y"), [1, 0, 1], 3)
    assert (source[0][0].mode, source[1][0].getpixel((0, 0)), source[0][1]) == ("RGB", (2, 4, 100), 1)
    with pytest.raises(InputError, match=r"toy \[test\], row 2: not a readable image"):
        source[2]
    assert "the data has 2 classes" in check_source(config, numbered(3))[0]
    assert "no column 'img'" in check_source({**config, "image": "img"}, numbered(2))[0]


def test_damaged_hub_data_is_one_clear_error(hub: Path):
    place = hub / "data" / "test-00000-of-00001.parquet"
    place.write_bytes(b"PAR1" + bytes(200) + b"PAR1")
    with pytest.raises(
        InputError, match=r"toy: cannot be loaded by `datasets` \((?!DatasetGenerationError)\w+: .*arquet"
    ) as caught:
        open_source({"hub": str(hub), "split": "test"})
    assert "\n" not in str(caught.value)


def test_hub_labels_without_class_names_are_checked(hub: Path):
    features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    data = table([encoded(image(1))] * 2, [0, -1]).replace_schema_metadata(metadata)
    for name in ("test", "train"):
        pq.write_table(data, hub / "data" / f"{name}-00000-of-00001.parquet")
    source = open_source({"hub": str(hub), "split": "test"})
    assert "labels run from -1 to 0" in content_faults(source, numbered(2))[0]


def test_hub_faults_are_input_errors(hub: Path):
    for config in ({"hub": str(hub), "split": "nosplit"}, {"hub": str(hub / "none"), "split": "test"}):
        with pytest.raises(InputError):
            open_source(config)
        assert len(check_source(config, numbered(2))) == 1


def test_hub_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install mergekit-vision\[hub\]"):
        open_source({"hub": "org/name", "split": "test"})


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ("x.parquet", "must be a mapping"),
        ({}, "is empty"),
        ({"parquet": "x", "folder": "y"}, "names more than one source"),
        ({"hub": "org/name"}, "`split` is missing"),
        ({"folder": ""}, "must be a text"),
        ({"torchvision": "a.B", "args": [1]}, "`args` must be a mapping"),
    ],
)
def test_malformed_sources(config: object, hint: str):
    assert hint in config_faults(config)[0]
    with pytest.raises(InputError, match=hint):
        open_source(config)


def test_resolve(tmp_path: Path):
    (tmp_path / "local").mkdir()
    assert resolve({"parquet": "a/*.parquet", "label": "fine"}, tmp_path) == {
        "parquet": f"{tmp_path}/a/*.parquet",
        "label": "fine",
    }
    assert resolve({"hub": "local", "split": "test"}, tmp_path)["hub"] == f"{tmp_path}/local"
    assert resolve({"hub": "org/name", "split": "test"}, tmp_path)["hub"] == "org/name"
    torchvision = resolve({"torchvision": "a.B", "args": {"root": "data", "train": False}}, tmp_path)
    assert torchvision["args"] == {"root": f"{tmp_path}/data", "train": False}
    assert resolve({"folder": "/abs"}, tmp_path) == {"folder": "/abs"}


def test_fingerprints_follow_the_content(parquet: Path, folder: Path):
    for config, touched in (
        ({"parquet": str(parquet)}, parquet.with_name("test-00002.parquet")),
        ({"folder": str(folder)}, folder / "cat" / "1.png"),
    ):
        before = open_source(config).fingerprint()
        assert open_source(config).fingerprint() == before
        if touched.suffix == ".png":
            image(99).save(touched)
        else:
            pq.write_table(table([encoded(image(1))], [0], ["a", "b", "c"]), touched)
        assert open_source(config).fingerprint() != before
