"""Exporting a merged model: everything is checked first, and the result is checked before it is there."""

import json
from pathlib import Path
from typing import Any, cast

import torch

from mergekit_vision.errors import InputError
from mergekit_vision.export.agreement import TOLERANCE
from mergekit_vision.export.directory import load_experts
from mergekit_vision.export.formats import FORMATS
from mergekit_vision.export.manifest import ROUTERS, read_record
from mergekit_vision.export.merged import open_merged
from mergekit_vision.export.writer import Writer
from mergekit_vision.support.console import logger
from mergekit_vision.support.faults import closest, raise_faults
from mergekit_vision.support.files import replacing_directory
from mergekit_vision.support.fingerprints import fingerprint
from mergekit_vision.support.imports import import_by_path
from mergekit_vision.support.json_files import write_json
from mergekit_vision.version import __version__

EXPORT = "export.json"
"""What was exported, how far it lies from the merged model, and the files that export wrote."""


def export_model(
    merged: Path,
    to: str,
    output: Path,
    device: str = "cpu",
    base_only: bool = False,
    allow_code: bool = False,
    verify: bool = True,
) -> float:
    """Write a merged model in another format, load it by the format's own library, and compare it with ours.

    Args:
        merged: directory written by ``merge``.
        to: one of :data:`FORMATS`.
        output: directory to write; missing, empty, or written by an earlier export that nobody changed since.
        device: that a ``torch`` program is made for.
        base_only: leave out the routed experts of a dynamic model.
        allow_code: import a router class even if no installed package registers it.
        verify: compare the files of ``merged`` with their checksums first.

    Returns:
        How far the embeddings of the written model lie from ours, at most, relative to their norm.

    Raises:
        InputError: when something stands in the way, or the written model computes anything else; nothing is left then.
    """
    check_request(merged, to, output, device, base_only)
    logger.info("reading %s", merged)
    record = _checked_record(merged, verify)
    model = open_merged(merged, record, {} if base_only else load_experts(merged, allow_code))
    model.encoder.to(device)
    writer = cast(Writer, import_by_path(FORMATS[to].writer)())
    raise_faults(merged, writer.faults(model))
    with replacing_directory(output) as draft:
        logger.info("writing %s", FORMATS[to].text)
        writer.write(model, draft)
        logger.info("loading it again and comparing")
        difference = writer.difference(model, draft)
        if not difference <= TOLERANCE:
            raise InputError(
                f"{to}: embeddings of what was written differ from those of {merged} by {difference:.1e} of their norm, "
                f"more than {TOLERANCE:.0e}; it was removed. Please report this"
            )
        _write_record(draft, {"format": to, "base_only": base_only, "difference": difference}, record)
    return difference


def check_request(merged: Path, to: str, output: Path, device: str, base_only: bool) -> None:
    """Refuse what cannot succeed, before anything large is read.

    Raises:
        InputError: that names every fault.
    """
    _checked_record(merged, verify=False)
    if to not in FORMATS:
        raise InputError(f"`to` {to}: not a format{closest(to, FORMATS)}; the formats are {', '.join(FORMATS)}", of="command")
    form, faults = FORMATS[to], [*_output_faults(output), *_device_faults(to, device)]
    if missing := form.missing():
        faults.append(f"`to` {to}: needs {', '.join(missing)}; pip install 'mergekit-vision[{form.extra}]'")
    if (merged / ROUTERS).exists() and not form.routed and not base_only:
        dynamic = ", ".join(name for name, other in FORMATS.items() if other.routed)
        faults.append(
            f"`to` {to}: {merged} is a dynamic model, and this format has no room for its routed experts; take one of {dynamic}, "
            "or export its static base alone (`base_only`)"
        )
    if faults:
        raise InputError("\n  ".join(faults), of="command")


def _checked_record(merged: Path, verify: bool) -> dict[str, Any]:
    """What ``merge.json`` holds; ``verify``, which a message may name, is the command's argument here, not a run's."""
    try:
        return read_record(merged, verify)
    except InputError as error:
        raise InputError(str(error), of=error.of and "command") from error


def _device_faults(to: str, device: str) -> list[str]:
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        return [f"`device` {device}: cannot be used ({str(error).splitlines()[0]})"]
    if torch.device(device).type != "cpu" and to != "torch":
        return [f"`device` {device}: of use to the format torch only; what {to} writes runs on any device"]
    return []


def _output_faults(output: Path) -> list[str]:
    """Why ``output`` must not be replaced: it is a file, or holds files that export did not write, or that were changed since."""
    if output.exists() and not output.is_dir():
        return [f"`output` {output}: is a file; name a directory"]
    written = _written(output)
    own = written.keys() | ({EXPORT} if written else set())
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
        return dict(json.loads((directory / EXPORT).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_record(directory: Path, about: dict[str, Any], record: dict[str, Any]) -> None:
    merge = {key: record[key] for key in ("suite", "scale")} | {"method": record["merger"]["name"]}
    files = {name: fingerprint(path) for name, path in _files(directory).items()}
    write_json(directory / EXPORT, {**about, "mergekit_vision": __version__, "merge": merge, "files": files})
