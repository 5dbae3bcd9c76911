"""Parquet files in the Hugging Face image schema, one row group in memory at a time."""

import bisect
import glob
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource, decode
from mergekit_vision.support.fingerprints import digest, fingerprint


class _Group(NamedTuple):
    """One row group: its file, number, first row in the file, number of rows, and the file's modification time."""

    path: Path
    number: int
    start: int
    rows: int
    modified: int


class ParquetImages(ImageSource):
    """Local Parquet files with a column ``image: {bytes, path}`` (or plain bytes) and an integer column ``label``.

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
        found = [str(pattern)] if Path(pattern).is_file() else sorted(glob.glob(str(pattern), recursive=True))  # noqa: PTH207
        if not found:
            raise InputError(f"{pattern}: no such file")
        self._groups: list[_Group] = []
        for path in map(Path, found):
            self._groups += self._footer(path)
        self._ends = list(accumulate(group.rows for group in self._groups))

    def _footer(self, path: Path) -> list[_Group]:
        """Check one file's schema; its row groups."""
        with _open(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
        missing = [column for column in (self._image, self._label) if column not in schema.names]
        if missing:
            raise InputError(
                f"{path}: no column {' or '.join(map(repr, missing))} among {', '.join(schema.names)}; "
                "name the columns by `image:` and `label:`"
            )
        image, label = schema.field(self._image).type, schema.field(self._label).type
        struct = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
        if not (struct or pa.types.is_binary(image) or pa.types.is_large_binary(image)):
            raise InputError(f"{path}: column {self._image!r} is {image}, not encoded images (struct<bytes, path> or binary)")
        if not pa.types.is_integer(label):
            raise InputError(f"{path}: column {self._label!r} is {label}, not integer class indices")
        names = _class_names(schema.metadata, self._label)
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
        value = _images(group, self._image)[row].as_py()
        return decode(_encoded(value, group.path, where), where), int(self._label_column[index])

    def labels(self) -> Sequence[int]:
        """Class index of every row; only the label column is read, once."""
        return [int(label) for label in self._label_column]

    def fingerprint(self) -> str:
        """Hash of the files' content and the column names."""
        files = dict.fromkeys(group.path for group in self._groups)
        return digest(self._image, self._label, *map(fingerprint, files))

    def label_range(self) -> tuple[int, int] | None:
        """Smallest and largest label, from the row groups' statistics where they are kept."""
        ranges = []
        for group in self._groups:
            with _open(group.path) as file:
                columns = file.metadata.row_group(group.number)
                stored = {columns.column(i).path_in_schema: columns.column(i).statistics for i in range(columns.num_columns)}
            known = stored.get(self._label)
            if known is None or not known.has_min_max or known.null_count:
                return super().label_range()
            ranges.append((int(known.min), int(known.max)))
        return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None

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


def _read(group: _Group, column: str) -> Any:
    # the file is opened for each read and no threads are used: nothing to break after a fork
    try:
        with _open(group.path) as file:
            return file.read_row_group(group.number, columns=[column], use_threads=False).column(0)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{group.path}, row group {group.number}: damaged ({error}); copy or download the file again") from error


def _open(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error


def _encoded(value: Any, file: Path, where: str) -> bytes | Path:
    """The encoded image of one cell: its bytes, or the file it names beside the Parquet file."""
    data: bytes | None = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return data
    path: str | None = value.get("path") if isinstance(value, dict) else None
    if not path:
        raise InputError(f"{where}: has no image; remove the row")
    return file.parent / path


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """Class names of the label column by the ``huggingface`` entry of a schema's metadata."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, names)) if names else None
