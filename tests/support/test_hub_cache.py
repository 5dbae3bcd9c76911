"""The cache of the hub's library, which other processes write to meanwhile."""

import hashlib
import os
from pathlib import Path
from typing import IO, Any

import pytest

from mergekit_vision.support.hub_cache import remove_damaged, whole_bytes

WHOLE = hashlib.sha256(b"whole").hexdigest()
BLOBS = {WHOLE: b"whole", "0" * 64: b"damaged", "1" * 64 + ".incomplete": b"half"}


@pytest.mark.parametrize("gone", BLOBS)
def test_files_may_vanish_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    """Each is looked at once, and not there when it is looked at again."""
    look = Path.stat

    def vanishing(self: Path, **options: bool) -> os.stat_result:
        found = look(self, **options)
        if self.name == gone:
            self.unlink()
        return found

    blobs = tmp_path / "blobs"
    blobs.mkdir()
    lost = {blobs / name for name in ("0" * 64, gone) if not name.endswith(".incomplete")}
    for act, expected in (
        (whole_bytes, len(b"whole") + len(b"damaged")),
        (lambda folder: set(remove_damaged(folder)), lost),  # what is gone is to be downloaded again
    ):
        for name, content in BLOBS.items():
            (blobs / name).write_bytes(content)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "stat", vanishing)
            assert act(tmp_path) == expected


def test_a_file_that_was_put_in_place_of_a_damaged_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "blobs" / WHOLE
    damaged.parent.mkdir()
    damaged.write_bytes(b"damaged")
    stream = Path.open

    def opened(self: Path, mode: str) -> IO[Any]:
        found = stream(self, mode)
        (tmp_path / "new").replace(damaged)
        return found

    (tmp_path / "new").write_bytes(b"whole")

    monkeypatch.setattr(Path, "open", opened)
    assert remove_damaged(tmp_path) == [damaged]
    monkeypatch.undo()
    assert damaged.read_bytes() == b"whole"
