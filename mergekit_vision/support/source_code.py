"""Which code results come from: a hash of the source of classes, and versions. They can be kept until it changes."""

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec, resolve_name
from pathlib import Path

from mergekit_vision.version import __version__

_BY_VERSION = ("builtins", "abc", "typing", "torch", "torchvision")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_fingerprint(classes: Iterable[type]) -> str | None:
    """Hash of the modules in which some classes are defined, and of what those import; 64 hexadecimal digits.

    What a module does is hashed, not how it is written: comments, docstrings and layout do not count.

    Imports are followed, inside of functions too, into modules of the same package and into modules that are not installed, such
    as files beside the user. Other libraries are known by their versions, which are not part of the hash; so are torch and
    torchvision where a class derives from one of theirs.

    Returns:
        ``None`` where a class has no source file: defined in an interactive session, or compiled.
    """
    parts: dict[str, str] = {}
    modules = {base.__module__ for cls in classes for base in cls.__mro__}
    for module in (name for name in modules if name.partition(".")[0] not in _BY_VERSION):
        if (file := _source(module)) is None:
            return None
        _follow(module, file, parts)
    return hashlib.blake2b(repr(sorted(parts.items())).encode(), digest_size=32).hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that results depend on."""
    packages = ("torch", "torchvision", "lightning", "open_clip_torch", "pillow")
    return {"mergekit_vision": __version__, **{name: version(name) for name in packages}}


def _follow(module: str, file: Path, parts: dict[str, str]) -> None:
    """Enter a module and all that it imports into ``parts``, name -> hash of what it does."""
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    parts[module], names = _read(file.read_bytes(), package)
    for name in names:
        if name in parts:
            continue
        found = _source(name) if _is_followed(name, module) else None
        if found is not None and (name.partition(".")[0] == module.partition(".")[0] or not _installed(found)):
            _follow(name, found, parts)


def _is_followed(name: str, module: str) -> bool:
    """Whether an import may lead to a file that counts: to look into an installed package would import the packages around it."""
    package = name.partition(".")[0]
    if package == module.partition(".")[0]:
        return True
    try:
        known = sys.modules.get(package)
        spec = find_spec(package) if known is None else known.__spec__
    except (ImportError, ValueError, AttributeError):
        return False
    # of a package without a file of its own, the folders
    places = [] if spec is None else [*(spec.submodule_search_locations or ()), *filter(None, [spec.origin])]
    return not any(_installed(Path(place)) for place in places)


@cache  # methods share most of what they import
def _read(source: bytes, package: str) -> tuple[str, tuple[str, ...]]:
    """A hash of the syntax tree without docstrings (and comments, which it has none of), and the names of what it imports."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # no code of this version of Python
        return hashlib.blake2b(source, digest_size=32).hexdigest(), ()
    names = tuple(_imported(tree, package))
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.blake2b(ast.dump(tree).encode(), digest_size=32).hexdigest(), names


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Absolute names of what a module of a package imports; ``from a import b`` may mean the module ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _source(module: str) -> Path | None:
    """A module's source file, if it has one."""
    try:
        known = sys.modules.get(module)
        spec = find_spec(module) if known is None else known.__spec__
    except Exception:  # `from package import function`, which is no module, or whatever the code of a package around it raises
        return None
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    return origin if origin is not None and origin.suffix == ".py" and origin.is_file() else None


def _installed(file: Path) -> bool:
    """Whether a file belongs to the standard library or to an installed package, of this environment or of one below it."""
    if {"site-packages", "dist-packages"} & set(file.resolve().parts):
        return True
    paths = sysconfig.get_paths()
    places = {Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return bool(places & set(file.resolve().parents))
