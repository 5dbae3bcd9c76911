"""Small pictures with known colors, and tables of them in the Hugging Face image schema."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


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


def row_groups_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled, from now on, with the number of every row group whose images are read."""
    reads: list[int] = []
    read = pq.ParquetFile.read_row_group

    def counting(self: pq.ParquetFile, number: int, columns: list[str] | None = None, **options: Any) -> pa.Table:
        if columns != ["label"]:
            reads.append(number)
        return read(self, number, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counting)
    return reads
