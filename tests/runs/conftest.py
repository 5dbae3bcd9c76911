"""Fixtures for the tests of whole runs."""

from typing import Any

import pytest

from mergekit_vision.merger import Merged, Merger
from mergekit_vision.merging.workbench import Workbench


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that were really merged."""
    names: list[str] = []
    merge = Workbench.merge

    def counting(self: Workbench, merger: Merger, *arguments: Any, **named: Any) -> Merged:
        names.append(type(merger).__name__)
        return merge(self, merger, *arguments, **named)

    monkeypatch.setattr(Workbench, "merge", counting)
    return names
