"""Sources as they stand in a suite file."""

from pathlib import Path

import pytest

from mergekit_vision.errors import InputError
from mergekit_vision.sources.config import config_faults, resolve
from mergekit_vision.sources.opening import open_source


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ("x.parquet", "must be a mapping"),
        ({}, "is empty"),
        ({"parquet": "x", "folder": "y"}, "names more than one source"),
        ({"hub": "org/name"}, "`split` is missing"),
        ({"folder": ""}, "folder: must be text"),
        ({"torchvision": "a.B", "args": [1]}, "args: must be a mapping"),
    ],
)
def test_malformed_sources(config: object, hint: str) -> None:
    assert hint in config_faults(config)[0]
    with pytest.raises(InputError, match=hint):
        open_source(config)


def test_resolve(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    assert resolve({"parquet": "a/*.parquet", "label": "fine"}, tmp_path) == {
        "parquet": f"{tmp_path}/a/*.parquet",
        "label": "fine",
    }
    assert resolve({"hub": "local", "split": "test"}, tmp_path)["hub"] == f"{tmp_path}/local"
    assert resolve({"hub": "org/name", "split": "test"}, tmp_path)["hub"] == "org/name"
    torchvision = resolve({"torchvision": "a.B", "args": {"root": "data", "train": False}}, tmp_path)
    assert torchvision["args"] == {"root": f"{tmp_path}/data", "train": False}
    assert resolve({"folder": "/abs"}, tmp_path) == {"folder": "/abs"}


def test_every_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "mnist").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))  # on Windows
    for kind in ("parquet", "folder", "hub"):
        assert resolve({kind: "~/mnist"}, tmp_path / "suite")[kind] == str(home / "mnist")
    assert resolve({"hub": "~/none", "split": "test"}, tmp_path)["hub"] == "~/none"
