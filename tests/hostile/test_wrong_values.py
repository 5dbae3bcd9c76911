"""Wrong values in each place of the JSON files that a merged model, a backbone and the cache consist of.

Each is refused in a message that names the file, or is a right value that other code can use. Long runs of it are slow ones.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clip_models import huggingface_model
from hostile.contents import Place, places, put, spliced
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from small_models import DYNAMIC, record_at, small_models

from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.errors import InputError
from mergekit_vision.export.card import model_card
from mergekit_vision.export.directory import load_experts
from mergekit_vision.export.manifest import read_record
from mergekit_vision.export.output import output_faults
from mergekit_vision.export.results import read_results
from mergekit_vision.runs import entries
from mergekit_vision.support.cache import Form

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    0.5,
    2**70,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "\x1b[2J",
    [],
    [None],
    {},
    {"": None},
]
FEW: list[Any] = [None, -1, [None]]


@pytest.fixture(scope="module")
def pristine(tiny_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dynamic merged model with its results, a model of transformers, and the record of an export, in one directory each."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("pristine")
    small_models(tiny_suite)(root / "merged", DYNAMIC)
    measured = {"kind": "evaluation", "split": "test", "route": "router", "tasks": {"grays": {"accuracy": 0.5, "n": 41}}}
    (root / "merged" / "results.json").write_text(json.dumps({**record_at(DYNAMIC), **measured}))
    huggingface_model().save_pretrained(root / "theirs")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3, "size": {"shortest_edge": 16}, "crop_size": 16}
    (root / "theirs" / "preprocessor_config.json").write_text(json.dumps(processor))
    (root / "export").mkdir()
    (root / "export" / "export.json").write_text(json.dumps({"format": "onnx", "files": {"model.onnx": "0" * 40}}))
    return root


def read_merged(directory: Path) -> None:
    model_card(read_record(directory, verify=False), dynamic=True)


def read_measured(directory: Path) -> None:
    record = read_record(directory, verify=False)
    model_card(record, dynamic=True, results=read_results(directory / "results.json", record))


READ: dict[str, Callable[[Path], object]] = {
    "merged/merge.json": read_merged,
    "merged/experts.json": load_experts,
    "merged/results.json": read_measured,
    "merged/open_clip_config.json": lambda directory: describe_backbone(f"local-dir:{directory}"),
    "theirs/config.json": lambda directory: describe_backbone(f"local-dir:{directory}"),
    "theirs/preprocessor_config.json": lambda directory: describe_backbone(f"local-dir:{directory}"),
    "export/export.json": output_faults,
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("values", [FEW, pytest.param(VALUES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_wrong_value_anywhere_is_refused_by_name_or_harmless(
    pristine: Path, tmp_path: Path, name: str, values: list[Any]
) -> None:
    place = Path(shutil.copytree(pristine / Path(name).parent, tmp_path / "copy"))
    path, refused = place / Path(name).name, 0
    content = json.loads(path.read_text())
    for where in places(content):
        for value in values:
            path.write_text(json.dumps(put(content, where, value)))
            refused += is_refused(lambda: READ[name](place), place)
    assert refused > 1 or name.startswith("export")


def is_refused(read: Callable[[], object], place: Path) -> bool:
    try:
        read()
    except InputError as error:
        lines = str(error).splitlines()
        assert str(place) in lines[0]
        assert len(lines) <= 22
        assert all(len(line) < 500 + len(str(place)) for line in lines)
        return True
    return False


@given(data=st.data())
def test_experts_with_bytes_changed_are_refused_or_whole(pristine: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of the header: that is where a reader can be led astray."""
    place, whole = tmp_path / "copy", (pristine / "merged" / "experts.safetensors").read_bytes()
    if not place.exists():
        shutil.copytree(pristine / "merged", place)
    path, shapes = place / "experts.safetensors", {name: tensor.shape for name, tensor in load(whole).items()}
    path.write_bytes(data.draw(spliced(whole, end=8 + int.from_bytes(whole[:8], "little"))))
    if not is_refused(lambda: load_experts(place), place):
        assert {name: tensor.shape for name, tensor in load(path.read_bytes()).items()} == shapes
    with pytest.raises(InputError, match=r"experts\.safetensors "):
        read_record(place)


ENTRIES: dict[str, tuple[Form[entries.Entry], Any]] = {
    "accuracies": (entries.accuracies(["a", "b"]), {"accuracy": {"a": 0.5, "b": 1.0}}),
    "method": (
        entries.method(["a"]),
        {
            "merger": {"name": "TIES", "init_args": {}},
            "scale": 0.5,
            "search": [{"scale": 0.5, "accuracy": 0.5}],
            "accuracy": {"a": 0.5},
            "seconds": {"merge": 1.0},
            "dynamic": True,
            "oracle": False,
            "extra_parameters": 3,
            "bytes": {"task": 8, "shared": 4},
            "routing": {"layer": {"a": 0.5}},
        },
    ),
    "analysis": (
        entries.analysis(["a", "b"]),
        {
            "similarity": {"tasks": ["a", "b"], "cosine": [[1.0, 0.5], [0.5, 1.0]]},
            "energy": {"layer": {"directions": [1, 2], "esd": [0.5, 1.0], "svd": [0.5, 1.0], "per_task": 1}},
        },
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_remembered_value_is_of_the_same_kind_or_none(name: str) -> None:
    form, sound = ENTRIES[name]
    assert form.decode(form.encode(sound)) == sound
    for where in places(sound):
        for value in VALUES:
            try:
                found = form.decode(json.dumps(put(sound, where, value)).encode())
            except (ValueError, KeyError, TypeError):
                continue
            assert kind_at(found, where) == kind_at(sound, where) or (where[0] in ("scale", "routing", "merger", "search"))


def kind_at(content: Any, place: Place) -> type:
    """The type of a part; whole numbers are numbers too."""
    for key in place:
        content = content[key]
    return float if type(content) is int else type(content)
