"""The directory of an export: what it holds, and when it may be replaced."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_vision.errors import InputError
from mergekit_vision.support.files import WORK
from mergekit_vision.support.fingerprints import fingerprint
from mergekit_vision.support.json_files import read_json, write_json
from mergekit_vision.support.switching import settle
from mergekit_vision.support.writable import place_fault
from mergekit_vision.version import __version__

CONTENTS = "export.json"
"""What was exported, how far it lies from the merged model, and the files that export wrote."""


def write_contents(directory: Path, about: Mapping[str, Any]) -> None:
    """Write ``export.json`` beside the complete files of an export: what is known ``about`` it, and each file's hash."""
    files = {name: fingerprint(path) for name, path in _files(directory).items()}
    write_json(directory / CONTENTS, {**about, "mergekit_vision": __version__, "files": files})


def output_faults(output: Path) -> list[str]:
    """Why ``output`` must not be replaced: it cannot be written, or holds files of others or changed ones."""
    if fault := place_fault(output):
        return [f"`output` {output}: {fault}"]
    settle(output)  # an export that was killed may have left links
    written, own = _written(output), own_files(output)
    others = [name for name, path in _files(output).items() if name not in own or _changed(path, written.get(name))]
    if not others:
        return []
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return [f"`output` {output}: holds files that export did not write ({', '.join(others[:3])}{more}); name another directory"]


def earlier_export(directory: Path) -> str | None:
    """What an earlier export wrote, in words, where there is one: ``onnx export of ESM on demo``."""
    try:
        content = read_json(directory / CONTENTS)
        return f"{content['format']} export of {content['merge']['method']} on {content['merge']['suite']}"
    except (InputError, KeyError, TypeError):
        return None


def own_files(directory: Path) -> set[str]:
    """Names of the files in a directory that an earlier export wrote."""
    written = _written(directory)
    return _files(directory).keys() & {*written, CONTENTS} if written else set()


def _files(directory: Path) -> dict[str, Path]:
    """Name and path of each file and link, but for those that are being written."""
    found = sorted(path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(directory): path for path in found}
    return {name.as_posix(): path for name, path in names.items() if name.parts[0] != WORK}


def _changed(path: Path, known: str | None) -> bool:
    return path.is_symlink() or not path.is_file() or (known is not None and fingerprint(path) != known)


def _written(directory: Path) -> dict[str, str]:
    """Name and hash of each file that an earlier export wrote."""
    try:
        return dict(read_json(directory / CONTENTS)["files"])
    except (InputError, ValueError, KeyError, TypeError):
        return {}
