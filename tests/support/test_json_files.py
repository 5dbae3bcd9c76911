import json
from pathlib import Path

import pytest
import torch

from mergekit_vision.support.json_files import same, to_json, write_json


def test_tensors_and_paths_become_plain_values(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "x.json", {"b": torch.tensor([1.5, 2.0]), "a": Path("a/b"), "c": (1, None)})
    text = (tmp_path / "deep" / "x.json").read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text).items()) == [("b", [1.5, 2.0]), ("a", "a/b"), ("c", [1, None])]


def test_text_to_hash_has_its_keys_in_order() -> None:
    assert to_json({"b": 1, "a": 2}) == '{"a": 2, "b": 1}'
    assert to_json({"b": 1, "a": 2}, in_order=True) == '{"b": 1, "a": 2}'


def test_configurations_are_compared_as_json_keeps_them() -> None:
    assert same({"mean": (0.5, 0.5)}, {"mean": [0.5, 0.5]})
    assert not same({"mean": (0.5, 0.5)}, {"mean": [0.5, 0.4]})


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    circle: dict[str, object] = {}
    circle["self"] = circle
    with pytest.raises(ValueError, match="Circular"):
        write_json(tmp_path / "x.json", circle)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
