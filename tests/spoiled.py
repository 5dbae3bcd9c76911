"""Entries of the cache with other content, and a digest as if it were theirs."""

from pathlib import Path

from mergekit_vision.support.cache import _head


def spoil(folder: Path, content: bytes) -> None:
    """Give every entry in a folder of the cache this content."""
    for path in folder.iterdir():
        path.write_bytes(_head(path, content) + content)
