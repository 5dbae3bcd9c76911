"""The rooms of the package, and who may import whom."""

import ast
import configparser
import re
import sys
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "mergekit_vision"

ROOMS: dict[str, set[str]] = {  # room -> the rooms it may import from; everything may import `errors`
    "version": set(),
    "functional": set(),
    "support": {"version"},
    "routers": {"functional"},
    "merger": {"routers", "support"},
    "parts": {"merger", "functional"},
    "fitting": {"merger", "routers", "functional"},
    "plugins": {"parts", "fitting", "merger", "routers", "functional"},
    "registry": {"merger", "support"},
    "checkpoints": {"support"},
    "sources": {"support"},
    "suites": {"checkpoints", "sources", "support"},
    "encoders": {"checkpoints", "merger", "routers", "support"},
    "data": {"suites", "sources", "encoders", "support"},
    "evaluation": {"data", "encoders", "routers", "merger", "support"},
    "merging": {
        "evaluation", "data", "suites", "encoders", "checkpoints", "merger", "routers", "functional", "support"
    },
    "export": {"encoders", "checkpoints", "merger", "routers", "support", "version"},
    "reports": {"support"},
    "runs": {
        "merging", "evaluation", "export", "reports", "registry", "data", "suites", "sources", "encoders", "checkpoints",
        "parts", "merger", "routers", "support"
    },
    "cli": {"runs", "export", "data", "registry", "suites", "merger", "support", "version"},
    "demo": {"suites", "sources", "encoders", "data", "support"},
}  # fmt: skip

EXCEPTIONS = {  # what builds on ESM: its default base
    ("plugins/esmpp.py", f"{PACKAGE}.plugins.esm"),
    ("plugins/esmppfit.py", f"{PACKAGE}.plugins.esm"),
    ("plugins/fisher.py", f"{PACKAGE}.plugins.esm"),
}


def sources() -> dict[str, Path]:
    """Module -> file, the plugins by the names they are installed under."""
    files = {path: path.relative_to(ROOT) for path in (ROOT / PACKAGE).rglob("*.py")}
    files |= {path: Path(PACKAGE) / path.relative_to(ROOT) for path in (ROOT / "plugins").rglob("*.py")}
    return {".".join(place.with_suffix("").parts).removesuffix(".__init__"): path for path, place in files.items()}


SOURCES = sources()


@cache
def imported(module: str) -> frozenset[str]:
    """Full names of what a module imports anywhere in it, relative imports included."""
    path, found = SOURCES[module], set()
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            found |= {name if (name := f"{origin}.{alias.name}") in SOURCES else origin for alias in node.names}
    return frozenset(found)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


MODULES = [pytest.param(name, id=name.removeprefix(f"{PACKAGE}.")) for name in sorted(SOURCES) if name != PACKAGE]


@pytest.mark.parametrize("module", MODULES)
def test_every_import_is_an_allowed_arrow(module: str) -> None:
    own = room(module)
    may = ROOMS[own] | {"errors"} if own in ROOMS else {"__main__": {"cli"}, "errors": set()}[own]
    if own != "plugins":  # a plugin knows no other plugin
        may |= {own}
    path = str(SOURCES[module].relative_to(ROOT))
    for name in imported(module):
        if name.startswith(f"{PACKAGE}."):
            assert room(name) in may or (path, name) in EXCEPTIONS, f"{path} imports {name}"


def test_rooms_are_those_that_exist_and_their_arrows_run_one_way() -> None:
    there = {room(name) for name in SOURCES} - {"", "__main__", "errors"}
    assert there == ROOMS.keys()
    done: set[str] = set()
    while ready := {name for name, others in ROOMS.items() if name not in done and others <= done}:
        done |= ready
    assert done == ROOMS.keys(), "a circle among the rooms"


def test_no_arrow_is_allowed_in_vain() -> None:
    used = {(room(module), room(name)) for module in SOURCES for name in imported(module) if name.startswith(f"{PACKAGE}.")}
    assert {(name, other) for name, others in ROOMS.items() for other in others} <= used


def test_no_circle_among_modules() -> None:
    arrows = {module: {name for name in imported(module) if name in SOURCES} - {module, PACKAGE} for module in SOURCES}
    done: set[str] = set()
    while ready := {name for name, others in arrows.items() if name not in done and others <= done}:
        done |= ready
    assert done == arrows.keys()


def test_at_most_ten_modules_lie_loose() -> None:
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= 10


def test_the_diagram_of_the_documentation_is_this_table() -> None:
    """It shows the arrows that do not follow from others: the transitive reduction."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    diagram = re.search(r"```mermaid\n(.*?)```", text, flags=re.DOTALL)
    assert diagram
    drawn = set(re.findall(r"^\s*(\w+) --> (\w+)$", diagram[1], flags=re.MULTILINE))
    assert drawn == {(name, other) for name, others in ROOMS.items() for other in others if not implied(name, other)}


def implied(name: str, other: str) -> bool:
    return any(other in reached(between) for between in ROOMS[name] - {other})


def reached(name: str) -> set[str]:
    return ROOMS[name].union(*map(reached, ROOMS[name]))


@pytest.mark.parametrize("module", [name for name in SOURCES if room(name) == "functional"])
def test_functional_knows_tensors_only(module: str) -> None:
    foreign = {name for name in imported(module) if name.split(".")[0] not in (*sys.stdlib_module_names, PACKAGE)}
    assert all(name.split(".")[0] == "torch" for name in foreign)


def test_packages_are_all_installed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    assert listed == {name for name, path in SOURCES.items() if path.stem == "__init__"}


def test_importing_the_package_loads_nothing_heavy() -> None:
    import subprocess

    script = "import sys, mergekit_vision; print([name for name in ('torch', 'lightning', 'open_clip') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
