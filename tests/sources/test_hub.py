"""Data sets of the hub's library, without a network."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pictures import image, numbered, table
from tiny import content_of, encoded, write_file

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import check_source, content_faults
from mergekit_vision.sources.opening import open_source


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the hub's layout with two splits; the third image of ``test`` is damaged."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # of newer and older versions
        if hasattr(datasets.config, name):
            monkeypatch.setattr(datasets.config, name, True)
    place = tmp_path / "toy" / "data"
    place.mkdir(parents=True)
    values = [encoded(image(1, "L")), encoded(image(2)), b"no image"]
    pq.write_table(table(values, [1, 0, 1], ["x", "y"]), place / "test-00000-of-00001.parquet")
    pq.write_table(table(values[:1], [0], ["x", "y"]), place / "train-00000-of-00001.parquet")
    return tmp_path / "toy"


def test_hub_layout_offline(hub: Path) -> None:
    config = {"hub": str(hub), "split": "test"}
    assert check_source(config, numbered(2)) == []
    source = open_source(config)
    assert (source.names, list(source.labels()), len(source)) == (("x", "y"), [1, 0, 1], 3)
    assert (source[0][0].mode, source[1][0].getpixel((0, 0)), source[0][1]) == ("RGB", (2, 4, 100), 1)
    with pytest.raises(InputError, match=r"toy \[test\], row 2: not a readable image"):
        source[2]
    assert "the data has 2 classes" in check_source(config, numbered(3))[0]
    assert "no column 'img'" in check_source({**config, "image": "img"}, numbered(2))[0]


def test_damaged_hub_data_is_one_clear_error(hub: Path) -> None:
    place = hub / "data" / "test-00000-of-00001.parquet"
    place.write_bytes(b"PAR1" + bytes(200) + b"PAR1")
    with pytest.raises(
        InputError, match=r"toy: cannot be loaded by `datasets` \((?!DatasetGenerationError)\w+: .*(arquet|thrift)"
    ) as caught:
        open_source({"hub": str(hub), "split": "test"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("head", ["a: [", "1: a"])
def test_a_description_that_cannot_be_read_is_one_clear_error(hub: Path, head: str) -> None:
    (hub / "README.md").write_text(f"---\n{head}\n---\n")
    (fault,) = check_source({"hub": str(hub), "split": "test"}, numbered(2))
    assert fault.startswith(f"{hub}: cannot be loaded by `datasets` (")
    assert "\n" not in fault


def test_hub_labels_without_class_names_are_checked(hub: Path) -> None:
    features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    data = table([encoded(image(1))] * 2, [0, -1]).replace_schema_metadata(metadata)
    for name in ("test", "train"):
        pq.write_table(data, hub / "data" / f"{name}-00000-of-00001.parquet")
    source = open_source({"hub": str(hub), "split": "test"})
    assert "labels run from -1 to 0" in content_faults(source, numbered(2))[0]


def test_hub_faults_are_input_errors(hub: Path) -> None:
    for config in ({"hub": str(hub), "split": "nosplit"}, {"hub": str(hub / "none"), "split": "test"}):
        with pytest.raises(InputError):
            open_source(config)
        assert len(check_source(config, numbered(2))) == 1


def test_hub_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install mergekit-vision\[hub\]"):
        open_source({"hub": "org/name", "split": "test"})


def test_a_file_that_a_row_names_lies_in_the_data_set(hub: Path) -> None:
    secret = hub.parent / "secret.png"
    image(9).save(secret)
    image(5).save(hub / "data" / "own.png")
    cells = [{"bytes": None, "path": str(path)} for path in (hub / "data" / "own.png", secret)]
    pq.write_table(table(cells, [0, 1], ["x", "y"]), hub / "data" / "test-00000-of-00001.parquet")
    source = open_source({"hub": str(hub), "split": "test"})
    assert source[0][0].getpixel((0, 0)) == (5, 10, 100)
    with pytest.raises(InputError, match=r"toy \[test\], row 1: names the file .*secret\.png', which is not below"):
        source[1]


def test_loose_images_of_a_directory_that_is_a_link(hub: Path) -> None:
    pets = hub.parent / "elsewhere" / "pets"
    for number, name in enumerate(("cat/1.png", "dog/1.png"), start=1):
        (pets / "test" / name).parent.mkdir(parents=True)
        image(number).save(pets / "test" / name)
    (hub.parent / "data").symlink_to(hub.parent / "elsewhere")
    source = open_source({"hub": str(hub.parent / "data" / "pets"), "split": "test"})
    assert (source.names, source[1][1], source[1][0].getpixel((0, 0))) == (("cat", "dog"), 1, (2, 4, 100))


def test_results_name_the_revision(hub: Path, root: Path) -> None:
    content = content_of(root)
    pinned = {"hub": str(hub), "split": "test", "revision": "abc"}
    content["tasks"]["stripes"] |= {"classes": ["x", "y"], "data": {**content["tasks"]["stripes"]["data"], "test": pinned}}
    data = VisionTasks(str(write_file(root, content)))
    assert data.hub_sources("test") == {"stripes": pinned}
    assert data.hub_sources("val") == {}
