"""Data of a few images each, in the formats that are read."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pictures import image, table
from tiny import encoded


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Three files of 5, 0 and 4 images in row groups of 2; image i has red = i and label i % 3."""
    for number, rows in enumerate(([0, 1, 2, 3, 4], [], [5, 6, 7, 8])):
        data = table([encoded(image(i)) for i in rows], [i % 3 for i in rows], ["a", "b", "c"])
        pq.write_table(data, tmp_path / f"test-0000{number}.parquet", row_group_size=2)
    return tmp_path / "test-*.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of two classes with 2 and 1 images."""
    for number, name in enumerate(("cat/1.png", "cat/2.png", "ant/1.jpg")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        image(10 * number, "L").save(tmp_path / "photos" / name)
    return tmp_path / "photos"
