"""When the hash of a class's code changes, and when it does not."""

import importlib
import sys
from pathlib import Path

import pytest

from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.support import source_code
from mergekit_vision.support.source_code import _follow, _source, code_fingerprint

FILES = {
    "__init__.py": "",
    "method.py": "from . import helper\nimport torch\n\nclass Method:\n    def run(self):\n        from theirs.late import x\n",
    "helper.py": "import beside\n",
    "late.py": "x = 1\n",
    "unrelated.py": "",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "theirs").mkdir()
    for name, text in FILES.items():
        (tmp_path / "theirs" / name).write_text(text)
    (tmp_path / "beside.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("theirs", "beside")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("theirs/method.py", True),
        ("theirs/helper.py", True),
        ("theirs/late.py", True),
        ("beside.py", True),
        ("theirs/unrelated.py", False),
    ],
)
def test_code_that_a_class_imports_counts(package: Path, file: str, changes: bool) -> None:
    method = importlib.import_module("theirs.method").Method
    before = code_fingerprint([method])
    (package / file).write_text((package / file).read_text() + "# changed\n")
    assert (code_fingerprint([method]) != before) == changes


def test_libraries_are_not_followed() -> None:
    files: dict[str, Path] = {}
    _follow(ESMPP.__module__, _source(ESMPP.__module__), files)
    assert {"mergekit_vision.functional.linalg", "mergekit_vision.plugins.esm"} <= set(files)
    assert {name.partition(".")[0] for name in files} == {"mergekit_vision"}
    assert not {"mergekit_vision.plugins.smile", "mergekit_vision.workbench"} & set(files)


def test_a_class_of_torch_does_not_read_all_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(source_code, "_imported", lambda module, file: read.append(module) or [])
    assert code_fingerprint([VisionEncoder])
    assert read == ["mergekit_vision.encoder"]


def test_methods_differ() -> None:
    assert code_fingerprint([ESM]) != code_fingerprint([ESMPP])


def test_a_class_without_a_file_has_none() -> None:
    space: dict = {"__name__": "nowhere"}
    exec("class Typed: pass", space)
    assert code_fingerprint([space["Typed"]]) is None
