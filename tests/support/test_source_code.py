"""When the hash of a class's code changes, and when it does not."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import mergekit_vision
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.support.source_code import code_fingerprint, versions

METHOD = '''"""A method."""
from . import helper  # one that helps
import torch

class Method:
    """Does something."""

    def run(self, x=1):
        """Do it."""
        from theirs.late import x
        return x + 1
'''
FILES = {
    "__init__.py": "",
    "method.py": METHOD,
    "helper.py": "import beside\n",
    "late.py": "x = 1\n",
    "unrelated.py": "",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "theirs").mkdir()
    for name, text in FILES.items():
        (tmp_path / "theirs" / name).write_text(text)
    (tmp_path / "beside.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("theirs", "beside")]:
        del sys.modules[name]


def method() -> type:
    found: type = importlib.import_module("theirs.method").Method
    return found


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
    before = code_fingerprint([method()])
    (package / file).write_text((package / file).read_text() + "changed = 1\n")
    assert (code_fingerprint([method()]) != before) == changes


@pytest.mark.parametrize("place", ["site-packages", "dist-packages"])
def test_packages_of_an_environment_below_this_one_do_not_count(
    package: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a virtual environment with the system's packages sees them."""
    (package / place).mkdir()
    (package / "beside.py").rename(package / place / "beside.py")
    monkeypatch.syspath_prepend(package / place)
    before = code_fingerprint([method()])
    (package / place / "beside.py").write_text("changed = 1\n")
    assert code_fingerprint([method()]) == before


@pytest.mark.parametrize("file", ["method.py", "helper.py", "late.py"])
def test_comments_do_not_count(package: Path, file: str) -> None:
    before = code_fingerprint([method()])
    path = package / "theirs" / file
    path.write_text(f"# first\n{path.read_text()}    # last\n")
    assert code_fingerprint([method()]) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# one that helps", "# another remark"),
        ('"""A method."""\n', ""),
        ('"""Does something."""', '"""Does something else."""'),
        ('    """Does something."""\n\n', ""),
        ('        """Do it."""\n', ""),
        ("import torch\n\n", "import torch\n\n\n"),
        ("x + 1", "(x\n            + 1)"),
        ("x=1", "x = 1"),
    ],
)
def test_what_changes_no_behavior_does_not_count(package: Path, old: str, new: str) -> None:
    """Remarks, docstrings and layout."""
    before = code_fingerprint([method()])
    assert METHOD.count(old) == 1
    (package / "theirs" / "method.py").write_text(METHOD.replace(old, new))
    assert code_fingerprint([method()]) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [("x + 1", "x + 2"), ("x + 1", "x - 1"), ("x=1", "x=2"), ("run", "walk"), ("x + 1", '"""Do it."""'), ("import torch", "")],
)
def test_what_changes_behavior_counts(package: Path, old: str, new: str) -> None:
    before = code_fingerprint([method()])
    assert METHOD.count(old) == 1
    (package / "theirs" / "method.py").write_text(METHOD.replace(old, new))
    assert code_fingerprint([method()]) != before


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This package under another name, where its files may be changed."""
    home = tmp_path / "their_copy"
    shutil.copytree(Path(mergekit_vision.__file__).parent, home, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    shutil.copytree(Path(sys.modules[ESM.__module__].__file__ or "").parent, home / "plugins", dirs_exist_ok=True)
    for path in home.rglob("*.py"):
        path.write_text(path.read_text().replace("mergekit_vision.", "their_copy."))
    monkeypatch.syspath_prepend(tmp_path)
    yield home
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_copy"]:
        del sys.modules[name]


def test_a_method_depends_on_what_it_uses_and_not_on_its_neighbors(copied: Path) -> None:
    cls = importlib.import_module("their_copy.plugins.esmpp").ESMPP
    before = code_fingerprint([cls])
    for file, changes in (
        ("functional/linalg.py", True),
        ("plugins/esm.py", True),
        ("routers.py", True),
        ("plugins/smile.py", False),
        ("merging/workbench.py", False),
        ("runs/module.py", False),
        ("encoders/vision.py", False),
    ):
        text = (copied / file).read_text()
        (copied / file).write_text(text + "\nCHANGED = 1\n")
        assert (code_fingerprint([cls]) != before) == changes, file
        (copied / file).write_text(text)
        assert code_fingerprint([cls]) == before


def test_a_class_of_torch_does_not_read_all_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self) or read_bytes(self))
    assert code_fingerprint([VisionEncoder])
    homes = {path.parents[1].name if path.parent.name != "mergekit_vision" else path.parent.name for path in read}
    assert homes == {"mergekit_vision"}
    assert any(path.name == "vision.py" for path in read)


def test_no_package_is_imported_to_look_into_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter what its code would raise, or that a file beside the user is no Python."""
    (package / "site-packages" / "lazy").mkdir(parents=True)
    (package / "site-packages" / "lazy" / "__init__.py").write_text(
        f"open({str(package / 'imported')!r}, 'w'); raise RuntimeError"
    )
    monkeypatch.syspath_prepend(package / "site-packages")
    (package / "older.py").write_text("print 'Python 2'")
    late = "\n\ndef late():\n    from lazy import inner\n    import older\n"
    (package / "theirs" / "method.py").write_text(METHOD + late)
    before = code_fingerprint([method()])
    assert not (package / "imported").exists()
    (package / "older.py").write_text("print 'changed'")
    assert code_fingerprint([method()]) != before


def test_methods_differ() -> None:
    assert code_fingerprint([ESM]) != code_fingerprint([ESMPP])


def test_a_class_without_a_file_has_none() -> None:
    space: dict[str, object] = {"__name__": "nowhere"}
    exec("class Typed: pass", space)
    typed = space["Typed"]
    assert isinstance(typed, type)
    assert code_fingerprint([typed]) is None


def test_versions_are_those_installed() -> None:
    assert versions()["torch"] == version("torch")
    assert {"mergekit_vision", "torch", "torchvision", "lightning", "open_clip_torch", "pillow"} == versions().keys()


def test_what_another_environment_installs_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an environment made with --system-site-packages."""
    below = tmp_path / "lib" / "site-packages"
    below.mkdir(parents=True)
    monkeypatch.syspath_prepend(below)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text("import theirs_below\nclass Mine: pass\n")
    (below / "theirs_below.py").write_text("a = 1\n")
    mine = importlib.import_module("mine").Mine
    before = code_fingerprint([mine])
    (below / "theirs_below.py").write_text("a = 2\n")
    assert code_fingerprint([mine]) == before
