"""Parquet files in the Hugging Face image schema, one row group in memory at a time."""

import bisect
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.decoding import decode, named_by_data
from mergekit_vision.sources.footer import check_columns, check_row_groups, class_names, matching
from mergekit_vision.support.faults import in_one_line
from mergekit_vision.support.fingerprints import digest, fingerprint, stamp
from mergekit_vision.support.memory import is_spent
from mergekit_vision.support.paths import is_file

_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last for names that are no text
_AGAIN = "copy or download the file again"


class _Group(NamedTuple):
    """One row group: its file, number, first row in the file, number of rows, and the file's modification time."""

    path: Path
    number: int
    start: int
    rows: int
    modified: int


class ParquetImages(ImageSource):
    """Local Parquet files with a column ``image: {bytes, path}`` (or plain bytes) and a column ``label`` of integers.

    Only footers are read at first, then one row group at a time. Class names come from the Hugging Face schema metadata.

    Args:
        pattern: a file, or a glob whose files are taken in order of their names.
        image: name of the image column.
        label: name of the label column.

    Raises:
        InputError: when no file matches, one is not Parquet, or the columns do not fit.
    """

    def __init__(self, pattern: str | Path, image: str = "image", label: str = "label") -> None:
        self._image, self._label = image, label
        self._groups: list[_Group] = []
        for path in matching(Path(pattern)):
            self._groups += self._footer(path)
        self._ends = list(accumulate(group.rows for group in self._groups))

    def _footer(self, path: Path) -> list[_Group]:
        """Check one file's schema; its row groups."""
        with _open(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
        check_columns(path, schema, self._image, self._label)
        check_row_groups(path, metadata)
        names = class_names(schema.metadata, self._label, path)
        if self._groups and names != self.names:
            raise InputError(f"{path}: names other classes than {self._groups[0].path}; give data sets of one kind")
        self.names = names
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        modified = path.stat().st_mtime_ns
        return [_Group(path, number, sum(rows[:number]), size, modified) for number, size in enumerate(rows)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and class at ``index``, counted through all files."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        position = bisect.bisect_right(self._ends, index)
        group = self._groups[position]
        row = index - (self._ends[position] - group.rows)
        where = f"{group.path}, row {group.start + row}"
        return decode(_encoded(_cell(group, self._image, row, where), group.path, where), where), int(self._label_column[index])

    def labels(self) -> Sequence[int]:
        """Class index of every row; only the label column is read, once."""
        return [int(label) for label in self._label_column]

    def fingerprint(self) -> str:
        """Hash of the files' content, the column names, and the sizes and modification times of image files that rows name."""
        files = dict.fromkeys(group.path for group in self._groups)
        named = (stamped for file in files for stamped in _stamps(file.parent, _named_files(stamp(file), self._image)))
        return digest(self._image, self._label, *map(fingerprint, files), *named)

    def label_range(self) -> tuple[int, int] | None:
        """Smallest and largest label."""
        # of the labels themselves: pyarrow ends the process where the statistics in a footer are damaged
        labels = self._label_column
        return (int(labels.min()), int(labels.max())) if len(labels) else None

    @cached_property
    def _label_column(self) -> Any:
        columns = []
        for group in self._groups:
            column = _read(group, self._label)
            if column.null_count:
                raise InputError(
                    f"{group.path}: {column.null_count} rows have no {self._label!r}; every image needs a class index"
                )
            columns.append(column.to_numpy())
        return np.concatenate(columns) if columns else np.empty(0, np.int64)


@lru_cache(maxsize=2)
def _images(group: _Group, column: str) -> Any:
    """Encoded images of one row group. Few are kept, over all data sets: one can take 100 MB."""
    return _read(group, column)


def _cell(group: _Group, column: str, row: int, where: str) -> Any:
    """What one row of a row group holds in the image column, as plain values."""
    try:
        return _images(group, column)[row].as_py()
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: damaged ({in_one_line(error)}); {_AGAIN}") from error


def _stamps(directory: Path, names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Stamps of the files that are there, of those that may be read."""
    if not names:
        return
    beside = {"", os.curdir, os.pardir}  # of an absolute path the first part is empty
    with suppress(OSError):
        beside |= {*os.listdir(directory)}  # noqa: PTH208 (names alone)
    for name in names:
        # beside bytes stands what the image was called once: very many files that need not be asked for
        if name.split("/", 1)[0] in beside:
            with suppress(InputError):  # it leads elsewhere
                file = named_by_data(name, [directory], name)
                if is_file(file):
                    yield name, *stamp(file)[1:]


@lru_cache(maxsize=64)
def _named_files(seen: tuple[str, int, int], column: str) -> list[str]:
    """Names that a file's rows give their images, sorted; the file by its stamp."""
    path = Path(seen[0])
    try:
        with _open(path) as file:
            images = file.schema_arrow.field(column).type
            if not (pa.types.is_struct(images) and images.get_field_index("path") >= 0):
                return []
            found = file.read(columns=[f"{column}.path"], use_threads=False).column(column)
        found.validate(full=True)  # what offsets say is believed afterwards
        return sorted({name for chunk in found.chunks for name in chunk.field("path").unique().to_pylist() if name})
    except _UNREADABLE as error:
        if is_spent(error):
            raise
        raise InputError(f"{path}: damaged ({in_one_line(error)}); {_AGAIN}") from error


def _read(group: _Group, column: str) -> Any:
    # the file is opened for each read and no threads are used: nothing to break after a fork
    try:
        with _open(group.path) as file:
            found = file.read_row_group(group.number, columns=[column], use_threads=False).column(0)
            found.validate(full=True)  # what offsets say is believed afterwards
        if len(found) != group.rows:
            raise pa.ArrowInvalid(f"{len(found)} rows instead of {group.rows}")
        return found
    except _UNREADABLE as error:
        if is_spent(error):
            raise
        raise InputError(
            f"{group.path}, row group {group.number}: damaged ({in_one_line(error)}); copy or download the file again"
        ) from error


def _open(path: Path) -> Any:
    try:
        try:
            return pq.ParquetFile(path)
        except UnicodeEncodeError:  # a name that is not UTF-8, which pyarrow takes as bytes alone
            return pq.ParquetFile(pa.OSFile(os.fsencode(path)))
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable Parquet file ({in_one_line(error)})") from error


def _encoded(value: Any, file: Path, where: str) -> bytes | Path:
    """The encoded image of one cell: its bytes, or the file it names beside the Parquet file."""
    data: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return data
    path: str | None = value.get("path") if isinstance(value, dict) else None
    if not path:
        raise InputError(f"{where}: has no image; remove the row")
    return named_by_data(path, [file.parent], where)
