"""Suite files from anyone: a suite, or an ``InputError`` that lists what is wrong, and nothing else.

A case is a change of a sound suite's content and what its message says.
"""

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile.contents import Place, places, put, spliced
from hypothesis import given
from hypothesis import strategies as st
from tiny import content_of, write_file

from mergekit_vision.errors import InputError
from mergekit_vision.suites.suite import Suite

CASES: dict[str, tuple[Place, Any, str]] = {
    "a list for all": ((), [], "the file: must be a mapping with the keys backbone, tasks, not the list []"),
    "a number for all": ((), 3, "the file: must be a mapping"),
    "another key": (("extra",), 1, "the file: unknown key `extra`; known are name, backbone, pretrained, tasks"),
    "a number as name": (("name",), 3, "name: must be text, not the int 3"),
    "an empty name": (("name",), "", "name: must be text"),
    "no backbone": (("backbone",), None, "backbone: must be text, not empty"),
    "a backbone that is a list": (("backbone",), ["a"], "backbone: must be text, not the list ['a']"),
    "two origins of weights": (("pretrained",), "openai", "remove `pretrained`"),
    "tasks as a list": (("tasks",), [{"a": 1}], "tasks: must be a mapping of task names to tasks"),
    "no tasks": (("tasks",), {}, "with one task at least"),
    "a number as a task's name": (("tasks",), {3: {}}, "task name 3 must be text of letters"),
    "nothing as a task's name": (("tasks",), {None: {}}, "task name None must be text"),
    "a date as a task's name": (("tasks",), {datetime.date(2020, 1, 2): {}}, "must be text of letters"),
    "a path as a task's name": (("tasks",), {"../a": {}}, "task name '../a' must be text"),
    "escape codes as a task's name": (("tasks",), {"\x1b[2J": {}}, "must be text of letters"),
    "a task that is text": (
        ("tasks", "grays"),
        "x",
        "tasks.grays: must be a mapping with the keys expert, data, not the str 'x'",
    ),
    "an expert that is a number": (("tasks", "grays", "expert"), 1.5, "tasks.grays.expert: "),
    "an expert of NUL": (("tasks", "grays", "expert"), "a\0b", "NUL"),
    "data that is text": (("tasks", "grays", "data"), "x.parquet", "must be a mapping of splits"),
    "a number as a split": (("tasks", "grays", "data"), {1: {"folder": "x"}}, "split 1 must be text"),
    "a source that is text": (("tasks", "grays", "data", "val"), "x.parquet", "must be a mapping such as `parquet: FILE`"),
    "a source that is nothing": (("tasks", "grays", "data", "val"), None, "must be a mapping such as `parquet: FILE`, not empty"),
    "an empty source": (("tasks", "grays", "data", "val"), {}, "is empty; a source is one of"),
    "two sources": (("tasks", "grays", "data", "val"), {"folder": "a", "hub": "b"}, "names more than one source: hub, folder"),
    "arguments that are text": (
        ("tasks", "grays", "data", "val"),
        {"torchvision": "a.B", "args": "x"},
        "args: must be a mapping of arguments",
    ),
    "arguments with numbers as names": (
        ("tasks", "grays", "data", "val"),
        {"torchvision": "a.B", "args": {1: 2}},
        "args: key 1 must be text",
    ),
    "a hub data set without a split": (("tasks", "grays", "data", "val"), {"hub": "a/b"}, "`split` is missing"),
    "classes as a mapping": (("tasks", "grays", "classes"), {"a": 1}, "classes: must be a list of texts, not the dict {'a': 1}"),
    "no class": (("tasks", "grays", "classes"), [], "classes: must be a list of texts, not the list []"),
    "a class that is false": (("tasks", "grays", "classes"), ["yes", False], "entry 1 must be text, not the bool False"),
    "a class in a class": (("tasks", "grays", "classes"), [["a"]], "entry 0 must be text, not the list ['a']"),
    "a class of spaces": (("tasks", "grays", "classes"), [" "], "entry 0 must be text, not the str ' '"),
    "a very long key": (("k" * 5000,), 1, "the file: unknown key `kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk…`"),
    "a template that is nothing": (("tasks", "grays", "templates"), [None], "entry 0 must be text, not empty"),
    "a template without a place": (("tasks", "grays", "templates"), ["a {x}"], "'a {x}' has no {} for the class name"),
    "a very long value": (("tasks", "grays", "classes"), "x" * 10**5, "must be a list of texts, not the str 'xxx"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_named(root: Path, case: str) -> None:
    place, value, message = CASES[case]
    with pytest.raises(InputError) as caught:
        Suite.load(write_file(root, put(content_of(root), place, value)))
    text = str(caught.value)
    assert message in text
    assert re.match(rf"{re.escape(str(root))}/suite.yaml: \d+ faults?\n  ", text)
    assert all(len(line) < 400 + len(str(root)) for line in text.splitlines())
    assert "pydantic" not in text.lower()
    assert "input" not in text.lower()


def test_thousands_of_faults_are_counted_at_once(root: Path) -> None:
    content = content_of(root)
    content["tasks"] |= {f"t{number}": {"expert": number, f"x{number}": 0} for number in range(1000)}
    with pytest.raises(InputError) as caught:
        Suite.load(write_file(root, content))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(": 3000 faults")
    assert lines[1].startswith("  tasks.t0: unknown key `x0`")
    assert lines[-1] == "  … and 2980 more"


SCALARS: Sequence[st.SearchStrategy[Any]] = (
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(["expert", "data", "val", "parquet", "hub", "split", "{}", "~root", "a\0", "..", "local-dir:", "x" * 300]),
    st.dates(),
    st.binary(max_size=4),
)
KEYS = st.one_of(*SCALARS[:3], SCALARS[4], SCALARS[5], st.dates())
VALUES = st.recursive(
    st.one_of(*SCALARS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


def refusal(path: Path) -> str | None:
    """Why a suite is refused, if it is; any other error is a fault of what is tested."""
    try:
        assert Suite.load(path).tasks
    except InputError as error:
        return str(error)
    return None


def sound(root: Path) -> dict[str, Any]:
    """The tiny suite with one task, whose data would not be fetched."""
    content = content_of(root)
    content["tasks"] = {"grays": content["tasks"]["grays"]}
    return content


@given(st.data())
def test_any_value_in_any_place_gives_a_suite_or_an_error_that_names_the_file(root: Path, data: st.DataObject) -> None:
    content = sound(root) if not (root / "sound").exists() else yaml.safe_load((root / "sound").read_text())
    (root / "sound").write_text(yaml.safe_dump(content))
    place = data.draw(st.sampled_from(list(places(content))))
    path = write_file(root, put(content, place, data.draw(VALUES)))
    message = refusal(path)
    assert message is None or message.startswith(f"{path}: ")


@given(st.data())
def test_a_file_with_any_bytes_changed_gives_a_suite_or_an_error(root: Path, data: st.DataObject) -> None:
    path = root / "suite.yaml"
    whole = path.read_bytes() if not (root / "whole").exists() else (root / "whole").read_bytes()
    (root / "whole").write_bytes(whole)
    path.write_bytes(data.draw(spliced(whole)))
    message = refusal(path)
    assert message is None or message.startswith(f"{path}: ")
