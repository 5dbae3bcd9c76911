"""Fixtures for the tests of merged directories."""

from pathlib import Path

import pytest
from small_models import Save, small_models


@pytest.fixture(scope="session")
def save(tiny_suite: Path) -> Save:
    """Writes small merged models; see :func:`small_models`."""
    return small_models(tiny_suite)
