"""Class names of the data against those of the task."""

from pathlib import Path

import pytest

from mergekit_vision.sources.checks import check_source


@pytest.mark.parametrize(
    ("classes", "exact", "message"),
    [
        (["ant", "cat"], True, None),
        (["ant", "feline"], False, None),  # a better name for the prompts
        (["insect", "feline"], False, None),
        (["ant", "feline"], True, "class 1 is `cat` in the data, but `feline` in the task's first split; `feline` missing here"),
        (["cat", "ant"], False, "class 0 is `ant` in the data, but `cat` under `classes`; list them in the order of the data"),
        (["bee", "ant"], False, "class 0 is `ant` in the data, but `bee` under `classes`; `bee` missing here; list them"),
        (["ant", "bee", "cat"], True, "has 2 classes, but there are 3 in the task's first split; `bee` missing here"),
        (["ant", "bee", "cat"], False, "has 2 classes, but there are 3 under `classes`; `bee` missing here"),
    ],
)
def test_a_name_stands_for_one_class_everywhere(folder: Path, classes: list[str], exact: bool, message: str | None) -> None:
    faults = check_source({"folder": str(folder)}, classes, exact)
    assert not faults if message is None else message in faults[0]
