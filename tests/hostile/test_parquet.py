"""Parquet files that are damaged, of another kind, or made to deceive."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile.outcomes import outcome
from hypothesis import given
from hypothesis import strategies as st
from pictures import image, numbered, table
from tiny import encoded

from mergekit_vision.errors import InputError
from mergekit_vision.sources import footer
from mergekit_vision.sources.checks import check_source
from mergekit_vision.sources.footer import class_names
from mergekit_vision.sources.parquet import ParquetImages

PIXELS = encoded(image(1))
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
GOOD = {"bytes": PIXELS, "path": None}


def columns(images: pa.Array, labels: pa.Array) -> pa.Table:
    return pa.table({"image": images, "label": labels})


def struct(**types: pa.DataType) -> pa.Table:
    """One row whose image is a struct of null fields."""
    return columns(pa.array([dict.fromkeys(types)], pa.struct(list(types.items()))), pa.array([0]))


def labeled(values: list[Any] | pa.Array, of: pa.DataType | None = None) -> pa.Table:
    return columns(pa.array([GOOD] * len(values), CELL), pa.array(values, of) if isinstance(values, list) else values)


def twice(name: str) -> pa.Table:
    good = table([PIXELS], [0])
    return good.append_column(name, good[name])


def footer_of(entry: Any) -> pa.Table:
    """A table whose Hugging Face metadata is this."""
    return table([PIXELS], [0]).replace_schema_metadata({"huggingface": entry if isinstance(entry, str) else json.dumps(entry)})


def named(names: Any) -> pa.Table:
    return footer_of({"info": {"features": {"label": {"names": names}}}})


TABLES: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "bytes are text": (lambda: struct(bytes=pa.string(), path=pa.string()), "column 'image' is struct<bytes: string"),
    "bytes are numbers": (lambda: struct(bytes=pa.int64(), path=pa.string()), "not encoded images"),
    "bytes are a list": (lambda: struct(bytes=pa.list_(pa.uint8())), "not encoded images"),
    "bytes are nested": (lambda: struct(bytes=pa.struct([("bytes", pa.binary())])), "not encoded images"),
    "a path that is a number": (lambda: struct(bytes=pa.binary(), path=pa.int64()), "not encoded images"),
    "only a path": (lambda: struct(path=pa.string()), "not encoded images"),
    "a list of images": (lambda: columns(pa.array([[GOOD]], pa.list_(CELL)), pa.array([0])), "not encoded images"),
    "images are pixels": (lambda: columns(pa.array([[[1, 2]]]), pa.array([0])), "not encoded images"),
    "no images at all": (lambda: columns(pa.array([None]), pa.array([0])), "column 'image' is null"),
    "two image columns": (lambda: twice("image"), "has 2 columns 'image'; keep one"),
    "two label columns": (lambda: twice("label"), "has 2 columns 'label'; keep one"),
    "a missing truth": (lambda: labeled([True, None]), "1 rows have no 'label'"),
    "fractions": (lambda: labeled([0.0, 1.0]), "column 'label' is double"),
    "words": (lambda: labeled(["cat", "dog"]), "column 'label' is string"),
    "a dictionary": (lambda: labeled(pa.array(["cat"]).dictionary_encode()), "column 'label' is dictionary"),
    "a list of labels": (lambda: labeled([[0, 1]]), "column 'label' is list"),
    "a missing label": (lambda: labeled([0, None]), "1 rows have no 'label'"),
    "a negative label": (lambda: labeled([0, -1]), "labels run from -1 to 0"),
    "a label too many": (lambda: labeled([0, 2]), "labels run from 0 to 2, but with 2 classes they must lie in 0 to 1"),
    "an enormous label": (lambda: labeled([2**64 - 1], pa.uint64()), "labels run from 18446744073709551615 to"),
    "no rows": (lambda: table([], []), "holds no images"),
    "no columns": (lambda: pa.table({}), "no column 'image' or 'label' among ; name the columns"),
    "no JSON": (lambda: footer_of("{"), "the footer's `huggingface` entry is not JSON"),
    "nested JSON": (lambda: footer_of("[" * 100_000), "is not JSON"),
    "a number of 10 000 digits": (lambda: footer_of("1" * 10_000), "the footer's `huggingface` entry"),
    "a list for a mapping": (lambda: footer_of([]), "holds no mapping where `info` belongs"),
    "a text for a mapping": (lambda: footer_of({"info": "features"}), "holds no mapping where `features` belongs"),
    "features in a list": (lambda: footer_of({"info": {"features": [{}]}}), "holds no mapping where `label` belongs"),
    "a feature that is a text": (lambda: footer_of({"info": {"features": {"label": "x"}}}), "no mapping where `names` belongs"),
    "names in one text": (lambda: named("ab"), "the `names` of 'label' are no list of texts"),
    "names by number": (lambda: named({"0": "a", "1": "b"}), "are no list of texts"),
    "names that are numbers": (lambda: named([0, 1]), "are no list of texts"),
    "a name that is null": (lambda: named(["a", None]), "are no list of texts"),
    "names for another number of classes": (lambda: named(["a"]), "the data has 1 classes, but there are 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_does_not_fit_is_one_line(name: str, tmp_path: Path) -> None:
    make, fragment = TABLES[name]
    pq.write_table(make(), tmp_path / "x.parquet")
    (fault,) = check_source({"parquet": str(tmp_path / "x.parquet")}, numbered(2))
    assert fragment in fault
    assert "\n" not in fault


@pytest.mark.parametrize("entry", ["null", "{}", '{"info": null}', '{"info": {"features": {"label": {"dtype": "int64"}}}}'])
def test_metadata_without_names_names_no_classes(entry: str) -> None:
    assert class_names({b"huggingface": entry.encode()}, "label", Path("x.parquet")) is None


CELLS: dict[str, tuple[dict[str, Any], str]] = {
    "null": ({"bytes": None, "path": None}, "row 1: has no image"),
    "no bytes": ({"bytes": b"", "path": None}, "row 1: not a readable image"),
    "an absolute path": ({"bytes": None, "path": "/etc/hostname"}, "row 1: names the file '/etc/hostname', which is not below"),
    "a path that leaves": ({"bytes": None, "path": "a/../../secret.png"}, "row 1: names the file 'a/../../secret.png'"),
    "the directory itself": ({"bytes": None, "path": "."}, "row 1: not a readable image (not a regular file)"),
    "a URL": ({"bytes": None, "path": "http://127.0.0.1:9/x.png"}, "row 1: names the URL 'http://127.0.0.1:9/x.png'"),
    "a NUL": ({"bytes": None, "path": "a\0b"}, "row 1: not a readable image"),
    "a missing file": ({"bytes": None, "path": "x.png"}, "row 1: not a readable image (no such file)"),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_that_is_no_image_is_named(name: str, tmp_path: Path) -> None:
    cell, fragment = CELLS[name]
    (tmp_path / "data").mkdir()
    image(9).save(tmp_path / "secret.png")
    pq.write_table(table([PIXELS, cell], [0, 0]), tmp_path / "data" / "x.parquet")
    with pytest.raises(InputError) as caught:
        ParquetImages(tmp_path / "data" / "x.parquet")[1]
    assert fragment in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'data' / 'x.parquet'}, row 1: ")


def test_bytes_come_before_a_path(tmp_path: Path) -> None:
    """The path that is stored beside them is of the machine that wrote the file."""
    pq.write_table(table([{"bytes": PIXELS, "path": "/home/someone/x.png"}], [0]), tmp_path / "x.parquet")
    assert ParquetImages(tmp_path / "x.parquet")[0][0].getpixel((0, 0)) == (1, 2, 100)


def encrypted(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4] + b"PARE")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "not a readable Parquet file"),
    "half": (lambda path: os.truncate(path, path.stat().st_size // 2), "not a readable Parquet file"),
    "without its end": (lambda path: os.truncate(path, path.stat().st_size - 8), "not a readable Parquet file"),
    "encrypted": (encrypted, "not a readable Parquet file"),
    "a column whose name is no text": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"label", b"\xffabel")),
        "not a readable Parquet file ('utf-8' codec",
    ),
    "text": (lambda path: path.write_text("image,label\n"), "not a readable Parquet file"),
    "a FIFO": (lambda path: [path.unlink(), os.mkfifo(path)], "no such file"),
    "a directory": (lambda path: [path.unlink(), path.mkdir()], "is a directory; name the files in it"),
    "nothing": (Path.unlink, "no such file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_parquet_is_one_line(name: str, tmp_path: Path) -> None:
    spoil, fragment = FILES[name]
    pq.write_table(table([PIXELS], [0]), tmp_path / "x.parquet")
    spoil(tmp_path / "x.parquet")
    (fault,) = check_source({"parquet": str(tmp_path / "x.parquet")}, numbered(2))
    assert fault.startswith(f"{tmp_path / 'x.parquet'}: {fragment}")
    assert "\n" not in fault


def test_a_glob_finds_files_below_a_directory_with_brackets(tmp_path: Path) -> None:
    place = tmp_path / "run[1]"
    place.mkdir()
    pq.write_table(table([PIXELS], [0]), place / "x[2].parquet")
    pq.write_table(table([PIXELS], [0]), place / "y.parquet")
    assert len(ParquetImages(place / "x[2].parquet")) == 1
    assert len(ParquetImages(place / "*.parquet")) == 2
    assert len(ParquetImages(tmp_path / "**" / "*.parquet")) == 2
    with pytest.raises(InputError, match=r"z\*\.parquet: no file matches"):
        ParquetImages(place / "z*.parquet")


def test_files_of_one_glob_must_all_fit(tmp_path: Path) -> None:
    pq.write_table(table([PIXELS], [0]), tmp_path / "1.parquet")
    pq.write_table(labeled(["cat"]), tmp_path / "2.parquet")
    with pytest.raises(InputError, match=r"2\.parquet: column 'label' is string"):
        ParquetImages(tmp_path / "*.parquet")
    pq.write_table(labeled([1], pa.uint8()), tmp_path / "2.parquet")
    assert list(ParquetImages(tmp_path / "*.parquet").labels()) == [0, 1], "integers of another size are as good"


def test_a_row_group_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footer, "_MOST_BYTES", 50_000)
    large = [os.urandom(15_000) for _ in range(4)]
    pq.write_table(table(large, [0] * 4), tmp_path / "x.parquet", row_group_size=2)
    assert len(ParquetImages(tmp_path / "x.parquet")) == 4
    pq.write_table(table(large, [0] * 4), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: row group 0 holds .* GiB.*row_group_size=1000"):
        ParquetImages(tmp_path / "x.parquet")


def read_whole(path: Path) -> None:
    source = ParquetImages(path)
    source.label_range()
    source.fingerprint()
    for index in range(len(source)):
        source[index]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["info", "features", "label", "names", "0"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(entry=JSON.map(json.dumps).map(str.encode) | st.binary(max_size=40))
def test_metadata_is_names_or_an_input_error(entry: bytes) -> None:
    names, fault = outcome(lambda: class_names({b"huggingface": entry}, "label", Path("x.parquet")))
    if fault is None:
        assert names is None or (isinstance(names, tuple) and all(isinstance(name, str) for name in names))
    else:
        assert fault.startswith("x.parquet: the footer's `huggingface` entry")


@given(cell=st.fixed_dictionaries({"bytes": st.none() | st.binary(max_size=30), "path": st.none() | st.text(max_size=12)}))
def test_a_cell_is_an_image_or_an_input_error(cell: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "cell.parquet"
    pq.write_table(table([cell], [0]), path)
    with pytest.raises(InputError, match=r"cell\.parquet, row 0: "):
        ParquetImages(path)[0]


def read_damaged(path: Path) -> None:
    """Read a file that is damaged in many ways."""
    whole = path.read_bytes()

    @given(st.dictionaries(st.integers(0, len(whole) - 1), st.integers(1, 255), min_size=1, max_size=3))
    def read(changes: dict[int, int]) -> None:
        data = bytearray(whole)
        for position, change in changes.items():
            data[position] ^= change
        path.write_bytes(data)
        _, fault = outcome(lambda: read_whole(path))
        assert "\n" not in (fault or "")

    read()


def test_a_damaged_file_is_read_or_an_input_error(tmp_path: Path) -> None:
    """In a process of its own: some of what pyarrow can be asked of a damaged footer ends the process."""
    pq.write_table(table([PIXELS] * 4, [0, 1, 0, 1], ["a", "b"]), tmp_path / "x.parquet", row_group_size=2)
    process = multiprocessing.get_context("fork").Process(target=read_damaged, args=(tmp_path / "x.parquet",))
    process.start()
    process.join(600)
    assert process.exitcode == 0
