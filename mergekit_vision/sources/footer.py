"""What the names and footers of Parquet files say, before any of their rows is read."""

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from mergekit_vision.errors import InputError

_MOST_BYTES = 1 << 31
"""Of one row group: it is read as a whole, and Arrow reads no more into one array."""


def matching(pattern: Path) -> list[Path]:
    """The file of this name, or the files that match it as a glob, in order of their names.

    Raises:
        InputError: when there are none.
    """
    if pattern.is_file():
        return [pattern]
    if pattern.is_dir():
        raise InputError(f"{pattern}: is a directory; name the files in it, as in {pattern / '*.parquet'}")
    above = next(place for place in pattern.parents if place.is_dir())  # what exists is taken by its name: run[1]/*.parquet
    rest = str(pattern.relative_to(above))
    found = sorted(above / name for name in glob.glob(rest, root_dir=above, recursive=True))  # noqa: PTH207
    files = [path for path in found if path.is_file()]
    if not files:
        raise InputError(f"{pattern}: no such file" if rest == glob.escape(rest) else f"{pattern}: no file matches")
    return files


def check_columns(path: Path, schema: pa.Schema, image: str, label: str) -> None:
    """Refuse a file that does not hold encoded images in the column ``image`` and integers or booleans in ``label``.

    Raises:
        InputError: with the first thing that is wrong.
    """
    for column in (image, label):
        if schema.names.count(column) > 1:
            raise InputError(f"{path}: has {schema.names.count(column)} columns {column!r}; keep one")
    missing = [column for column in (image, label) if column not in schema.names]
    if missing:
        raise InputError(
            f"{path}: no column {' or '.join(map(repr, missing))} among {', '.join(schema.names)}; "
            "name the columns by `image:` and `label:`"
        )
    images, labels = schema.field(image).type, schema.field(label).type
    if not _holds_images(images):
        raise InputError(f"{path}: column {image!r} is {images}, not encoded images (struct<bytes, path> or binary)")
    if not (pa.types.is_integer(labels) or pa.types.is_boolean(labels)):
        raise InputError(f"{path}: column {label!r} is {labels}, not integer class indices")


def _holds_images(column: pa.DataType) -> bool:
    """Whether a column is binary, or a struct of ``bytes`` and perhaps a ``path``."""
    if not pa.types.is_struct(column):
        return bool(pa.types.is_binary(column) or pa.types.is_large_binary(column))
    fields = [column.field(position) for position in range(column.num_fields)]
    types = {field.name: field.type for field in fields}
    text = types.get("path", pa.string())
    return (
        len(types) == len(fields)
        and "bytes" in types
        and bool(pa.types.is_binary(types["bytes"]) or pa.types.is_large_binary(types["bytes"]))
        and bool(pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_null(text))
    )


def check_row_groups(path: Path, metadata: Any) -> None:
    """Refuse a file with a row group that does not fit into memory at once.

    Raises:
        InputError: naming the first one.
    """
    sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    for number, size in enumerate(sizes):
        if size > _MOST_BYTES:
            raise InputError(
                f"{path}: row group {number} holds {size / 2**30:.1f} GiB, but is read as a whole; write the file with smaller "
                "ones (row_group_size=1000)"
            )


def class_names(metadata: Mapping[bytes, bytes] | None, label: str, path: Path) -> tuple[str, ...] | None:
    """Class names of the label column by the ``huggingface`` entry of a schema's metadata; ``None`` where it tells none.

    Raises:
        InputError: when the entry is of another form.
    """
    text, where = (metadata or {}).get(b"huggingface"), f"{path}: the footer's `huggingface` entry"
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON; write the file again without it") from error
    for key in ("info", "features", label, "names"):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise InputError(f"{where} holds no mapping where `{key}` belongs; write the file again without it")
        value = value.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise InputError(f"{where}: the `names` of {label!r} are no list of texts; write the file again without it")
    return tuple(value) if value else None
