"""Fixtures of the image sources."""

from sources.conftest import folder, parquet

__all__ = ["folder", "parquet"]
