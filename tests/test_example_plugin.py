"""The example of a plugin as its author has it: a package of its own, installed, found by name and used from outside."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
BUILT = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*_cache")


def python(*arguments: str, where: Path, packages: Path | None = None) -> str:
    """Run Python in a process of its own, with a directory of ``packages`` on its path; gives what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    process = subprocess.run(
        [sys.executable, *arguments], cwd=where, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example outside of this repository: building leaves files behind."""
    place = tmp_path_factory.mktemp("example") / "plugin"
    shutil.copytree(REPOSITORY / "examples" / "plugin", place, ignore=BUILT)
    return place


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example installed, and nothing else."""
    place = tmp_path_factory.mktemp("site")
    offline = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    python("-m", "pip", "install", *offline, "--target", str(place), str(source), where=source)
    return place


def test_the_command_line_finds_it_by_name(installed: Path, tiny_suite: Path, tmp_path: Path) -> None:
    options = ("--suite", str(tiny_suite), "--model.merger", "Isotropic", "--model.merger.other", "mean", "--output", "out")
    python("-m", "mergekit_vision", "test", *options, where=tmp_path, packages=installed)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    path = "mergekit_vision_isotropic.method.Isotropic"
    assert found["merger"] == {"name": "Isotropic", "recipe": "Isotropic", "class_path": path, "init_args": {"other": "mean"}}
    assert found["scale"] == 1.0
    assert 0 < found["mean"]["accuracy"] <= 1


def test_its_own_tests_pass(installed: Path, source: Path) -> None:
    assert " passed" in python("-m", "pytest", "-p", "no:cacheprovider", where=source, packages=installed)


def test_it_keeps_the_contract(installed: Path) -> None:
    """As its README says: the checkout's tests of the contract run every method that is installed."""
    options = ("tests/plugins/test_contract.py", "-k", "Isotropic", "-p", "no:cacheprovider")
    assert " passed" in python("-m", "pytest", *options, where=REPOSITORY, packages=installed)
