"""The arrows of the architecture: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN_MAY = ("merger", "functional", "layers", "routers", "errors")


def imported(path: Path) -> set[str]:
    """Full names of the modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


def files(folder: str) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", files("mergekit_vision/functional"))
def test_functional_knows_tensors_only(path: Path) -> None:
    third_party = {name for name in imported(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert all(name.split(".")[0] == "torch" or name.startswith("mergekit_vision.functional") for name in third_party)


@pytest.mark.parametrize("path", files("plugins"))
def test_plugins_know_the_contract_and_the_math(path: Path) -> None:
    own = {name.removeprefix("mergekit_vision.") for name in imported(path) if name.startswith("mergekit_vision")}
    assert all(name.split(".")[0] in PLUGIN_MAY for name in own)
    assert not {"lightning", "open_clip", "torchvision"} & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", files("mergekit_vision"))
def test_nothing_imports_a_plugin(path: Path) -> None:
    assert not any("plugins" in name.split(".") for name in imported(path))
