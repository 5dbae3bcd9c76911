"""The notes that the published suites are from, where they are at hand."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTES = Path(__file__).parents[2] / "shared" / "suites"


def notes(name: str) -> Any:
    """What the notes say of a task."""
    if not NOTES.is_dir():
        pytest.skip(f"no notes in {NOTES}")
    return json.loads((NOTES / f"{name}.json").read_text(encoding="utf-8"))


def texts_of(family: str, name: str) -> dict[str, list[str]]:
    """Classes and templates by the notes, in the order of the labels of the hub's data."""
    found = notes(name)
    variants = found["variants"]
    own = variants.get("tall" if family == "tall" else "fusion_bench_SWAPPED", {})
    classes, templates = (list(own.get(key, found[key])) for key in ("classes", "templates"))
    if (family, name) == ("tall", "food101"):  # the notes have it in the order of torchvision's labels
        classes[16], classes[17] = classes[17], classes[16]
    return {"classes": classes, "templates": templates}
