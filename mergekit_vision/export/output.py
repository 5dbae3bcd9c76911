"""The directory of an export: what it holds, and when it may be replaced."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_vision.support.fingerprints import fingerprint
from mergekit_vision.support.json_files import write_json
from mergekit_vision.version import __version__

CONTENTS = "export.json"
"""What was exported, how far it lies from the merged model, and the files that export wrote."""


def write_contents(directory: Path, about: Mapping[str, Any]) -> None:
    """Write ``export.json`` beside the complete files of an export: what is known ``about`` it, and each file's hash."""
    files = {name: fingerprint(path) for name, path in _files(directory).items()}
    write_json(directory / CONTENTS, {**about, "mergekit_vision": __version__, "files": files})


def output_faults(output: Path) -> list[str]:
    """Why ``output`` must not be replaced: it is a file, or holds files that export did not write, or that were changed since."""
    if output.exists() and not output.is_dir():
        return [f"`output` {output}: is a file; name a directory"]
    written = _written(output)
    own = written.keys() | ({CONTENTS} if written else set())
    others = [name for name, path in _files(output).items() if name not in own or _changed(path, written.get(name))]
    if not others:
        return []
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return [f"`output` {output}: holds files that export did not write ({', '.join(others[:3])}{more}); name another directory"]


def _files(directory: Path) -> dict[str, Path]:
    """Name and path of each file and link."""
    found = sorted(path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(directory).as_posix(): path for path in found}


def _changed(path: Path, known: str | None) -> bool:
    return path.is_symlink() or (known is not None and fingerprint(path) != known)


def _written(directory: Path) -> dict[str, str]:
    """Name and hash of each file that an earlier export wrote."""
    try:
        return dict(json.loads((directory / CONTENTS).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
