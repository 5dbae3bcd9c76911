"""What all sources have in common once they are open."""

from pathlib import Path

import pyarrow.parquet as pq
from pictures import image, table
from tiny import encoded

from mergekit_vision.sources.opening import open_source


def test_fingerprints_follow_the_content(parquet: Path, folder: Path) -> None:
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
