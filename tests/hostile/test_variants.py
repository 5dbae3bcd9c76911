"""Files of variants and grids of parameters from anyone: rows of methods, or an ``InputError``, and nothing else.

A case is one entry of the file, or the file's whole text, and what the message says.
"""

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_vision.errors import InputError
from mergekit_vision.merging.record import merger_record
from mergekit_vision.plugins.tsvm import TSVM
from mergekit_vision.runs.building import build_merger
from mergekit_vision.runs.grids import grid_rows
from mergekit_vision.runs.variant_files import read_variants


def method(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "a blank name": ({"name": "  "}, "entry 1: `name` must be text, not the str '  '"),
    "a number as name": ({"name": 3}, "entry 1: `name` must be text, not the int 3"),
    "an unknown key": ({"scales": 1}, "a: unknown key `scales` (did you mean `scale`?)"),
    "no method": ({"merger": None}, "must be a method's name, or a mapping of class_path and init_args, not empty"),
    "a number as method": ({"merger": 3}, "must be a method's name, or a mapping of class_path and init_args, not the int 3"),
    "a function": ({"merger": "os.system"}, "is not a subclass of"),
    "a program": ({"merger": method("subprocess.Popen", args="touch ran")}, "is not a subclass of"),
    "a list of arguments": ({"merger": {"class_path": "TIES", "init_args": [1]}}, "init_args: must be a mapping"),
    "an unknown argument": ({"merger": method("TIES", x=1)}, "unknown key `init_args.x`; TIES takes density"),
    "a private argument": ({"merger": method("TIES", _x=1, self=2)}, "unknown key `init_args._x`"),
    "text as density": ({"merger": method("TIES", density="x")}, "init_args.density: must be a number, not the str 'x'"),
    "a density that is none": ({"merger": method("TIES", density=float("nan"))}, "density is nan, but must be"),
    "an unknown base": ({"merger": method("ESMPP", base="nosuch")}, "init_args.base: there is no merger 'nosuch'"),
    **{f"the scale {scale!r}": ({"scale": scale}, "a.scale: ") for scale in (float("nan"), float("inf"), 1e30, True, "auto", [])},
    "a route of a static model": ({"route": "router"}, "Average returns a static model, which routes nothing"),
    "a dtype of a static model": ({"expert_dtype": "bfloat16"}, "Average returns a static model, which routes nothing"),
    "an unknown dtype": ({"merger": "SMILE", "expert_dtype": "int8"}, "a.expert_dtype: must be float32 or bfloat16, not the str"),
    "an unknown route": ({"merger": "SMILE", "route": "x"}, "a.route: must be router, oracle or base, not the str 'x'"),
    **{f"{proxies!r} proxies": ({"proxies": proxies}, "a.proxies: ") for proxies in (0, -1, 1e30, "8", True, [], None)},
    "no proxies": ({"proxies": {"n": 0}}, "`proxies.n` must be 1 or more, not 0"),
    "a negative seed": ({"proxies": {"seed": -1}}, "`proxies.seed` must lie in 0 to 2**32 - 1"),
    "a label that is text": ({"proxies": {"label": "red"}}, "a.proxies.label: must be a whole number, not the str 'red'"),
    "a source that is none": ({"proxies": {"source": {}}}, "`proxies.source`: is empty"),
    **{f"the tasks {tasks!r}": ({"tasks": tasks}, "a.tasks: must be") for tasks in (0, -1, [], [1], True, 1.5, "colors", {})},
    "a task twice": ({"tasks": ["colors", "grays", "colors"]}, "a.tasks: names colors twice"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_each_mistake_in_a_variant_is_one_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, message = ENTRIES[case]
    monkeypatch.chdir(tmp_path)
    Path("v.yaml").write_text(yaml.safe_dump([{"name": "a", "merger": "Average", **entry}]))
    with pytest.raises(InputError) as caught:
        read_variants(Path("v.yaml"))
    head, line = str(caught.value).split("\n  ")
    assert head == "v.yaml: 1 fault"
    assert message in line
    assert len(line) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["v.yaml"]


TEXTS = {
    "": "must be a list of variants, each with the keys name and merger, not empty",
    "3": "must be a list of variants",
    "{a: 1}": "must be a list of variants",
    "[1, x, null]": "entry 3 must be a mapping with the keys name and merger, not empty",
    "[{name: a, merger: TIES}, {name: a, merger: TIES}]": "entry 2: there is another variant of the name a",
    "- {name: a, merger: &m {class_path: ESMPP, init_args: {base: *m}}}": "aliases stand for more than",
    "- {name: a, name: b, merger: TIES}": "key 'name' is given twice",
    "- !!python/object/apply:os.system [touch ran]": "could not determine a constructor for the tag",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_that_lists_no_variants(text: str, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_variants(tmp_path / "v.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/v.yaml: ")
    assert TEXTS[text] in str(caught.value)


def test_methods_in_methods_are_recorded_in_no_time() -> None:
    """What doubles with each level would not end."""
    deep = reduce(lambda base, _: method("SVC", base=base), range(60), "TSVM")
    record = merger_record(build_merger(deep))
    assert record["recipe"] == "SVC(" * 60 + "TSVM" + ")" * 60
    assert record["init_args"]["base"]["init_args"]["base"]["name"] == "SVC"


GRIDS: list[tuple[Any, str]] = [
    ({}, "`grid` is empty"),
    ({"rank": []}, "`grid`: rank has no values"),
    ({"rank": [4, 4]}, "`grid`: rank has a value twice"),
    ({"rank": list(range(1, 1002))}, "`grid` has 1001 combinations"),
    ({1: [1]}, "`grid`: 1 is no parameter's name"),
    ({None: [1]}, "`grid`: None is no parameter's name"),
    ({"": [1]}, "`grid`: '' is no parameter's name"),
    ({"..": [1]}, "is no method that has parameters"),
    ({"rank.x": [1]}, "rank is no method that has parameters"),
    ({"__class__": [1]}, "unknown key `__class__`"),
    *(({"rank": [value]}, "grid: rank: must be a whole number") for value in ("a", True, 1.5, float("nan"), [1], {"a": 1})),
    ({"rank": [-1]}, "rank is -1, but must be a whole number, 1 or more"),
]


@pytest.mark.parametrize(("grid", "message"), GRIDS, ids=str)
def test_each_mistake_in_a_grid_is_named(grid: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        grid_rows(TSVM(), grid)
    assert message in str(caught.value)
