"""Local Parquet files."""

import multiprocessing
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import image, numbered, row_groups_read, table
from PIL import Image
from tiny import encoded

from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import check_source
from mergekit_vision.sources.opening import open_source
from mergekit_vision.sources.parquet import ParquetImages


def test_parquet_glob_in_any_order(parquet: Path) -> None:
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


@pytest.mark.parametrize("directory", ["/", ".", "..", "photos"])
def test_a_directory_is_no_parquet_file(directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^{re.escape(directory)}: is a directory; name the files in it, .*\*\.parquet$"):
        open_source({"parquet": directory})


def test_parquet_reads_each_row_group_once_in_order_and_keeps_few(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = row_groups_read(monkeypatch)
    source = ParquetImages(str(parquet))
    for index in range(9):
        source[index]
    assert reads == [0, 1, 2, 0, 1], "three row groups of the first file, two of the last"
    for index in (8, 6):
        source[index]
    assert len(reads) == 5, "the last two are kept"
    source[0]
    assert len(reads) == 6, "and no others"


def _first_red(source: ParquetImages, results: Any) -> None:
    results.put(source[8][0].getpixel((0, 0))[0])


def test_parquet_survives_pickling_and_a_fork(parquet: Path) -> None:
    source = ParquetImages(str(parquet))
    source[0]
    assert pickle.loads(pickle.dumps(source))[8][1] == 2
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_first_red, args=(source, results))
    process.start()
    assert results.get(timeout=60) == 8
    process.join()


def test_a_rewritten_file_is_not_served_from_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for value in (10, 20):
        pq.write_table(table([encoded(image(value))], [0]), path)
        assert ParquetImages(path)[0][0].getpixel((0, 0))[0] == value


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    picture = image(50, mode)
    name = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    picture.save(name)
    pq.write_table(table([name.read_bytes()], [0]), tmp_path / "x.parquet")
    found = ParquetImages(tmp_path / "x.parquet")[0][0]
    assert found.mode == "RGB"
    with Image.open(name) as again:
        assert np.array_equal(np.asarray(found), np.asarray(again.convert("RGB")))


def test_a_damaged_image_is_named_by_file_and_row(tmp_path: Path) -> None:
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


def test_parquet_columns(tmp_path: Path) -> None:
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


def test_labels_may_be_true_and_false(tmp_path: Path) -> None:
    pq.write_table(table([encoded(image(1))] * 2, [True, False], label_type=pa.bool_()), tmp_path / "x.parquet")
    source = ParquetImages(tmp_path / "x.parquet")
    assert check_source({"parquet": str(tmp_path / "x.parquet")}, numbered(2)) == []
    assert (source.labels(), source.label_range(), source[0][1]) == ([1, 0], (0, 1), 1)
    assert {type(label) for label in (*source.labels(), source[0][1])} == {int}


def test_the_fingerprint_follows_the_files_that_rows_name(tmp_path: Path) -> None:
    """Not those that lie elsewhere and are not read."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    named = [tmp_path / "data" / "1.png", tmp_path / "data" / "a" / "2.png", tmp_path / "elsewhere.png"]
    for path in named:
        image(1).save(path)
    paths = [
        "./1.png",
        str(named[1]),
        "../elsewhere.png",
        str(named[2]),
        "gone.png",
        "a/gone.png",
        "a",
        "a\0",
        "http://x/y.png",
        "",
        None,
    ]
    cells: list[object] = [{"bytes": encoded(image(1)), "path": "what it was called"}]
    cells += [{"bytes": None, "path": path} for path in paths]
    data = table(cells, [0] * len(cells)).append_column("image.path", pa.array(["", *paths]))
    pq.write_table(data, tmp_path / "data" / "x.parquet", row_group_size=3)
    found = []
    for number, path in enumerate((None, *named)):
        if path is not None:
            os.utime(path, ns=(number, number))
        found.append(ParquetImages(tmp_path / "data" / "*.parquet").fingerprint())
    assert len(set(found)) == 3
    assert found[2] == found[3]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system of any names")
def test_a_directory_may_have_any_name(parquet: Path, tmp_path: Path) -> None:
    before = ParquetImages(parquet).fingerprint()
    directory = parquet.parent.rename(tmp_path.parent / os.fsdecode(b"\xe9"))  # Latin-1, no UTF-8
    source = ParquetImages(directory / parquet.name)
    assert (len(source), source[8][1], source.fingerprint()) == (9, 2, before)


@pytest.mark.parametrize("error", [MemoryError(), pa.ArrowMemoryError("malloc of size 64 failed")])
@pytest.mark.parametrize("place", ["mergekit_vision.sources.decoding.rgb", "pyarrow.parquet.ParquetFile.read_row_group"])
def test_memory_that_runs_out_is_no_damage(parquet: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception) -> None:
    def failing(*_: object, **__: object) -> NoReturn:
        raise error

    source = ParquetImages(parquet)
    monkeypatch.setattr(place, failing)
    with pytest.raises(MemoryError):
        source[0]


def test_parquet_of_several_kinds_is_refused(tmp_path: Path) -> None:
    pq.write_table(table([encoded(image(1))], [0], ["a"]), tmp_path / "1.parquet")
    pq.write_table(table([encoded(image(1))], [0], ["b"]), tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"2\.parquet: names other classes than .*1\.parquet"):
        open_source({"parquet": str(tmp_path / "*.parquet")})


@pytest.mark.parametrize("statistics", [True, False])
def test_label_range_with_and_without_statistics(tmp_path: Path, statistics: bool) -> None:
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
