"""Exporting a merged model: everything is checked first, and the result is checked before it is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError

from mergekit_vision.errors import InputError
from mergekit_vision.export.agreement import TOLERANCE
from mergekit_vision.export.directory import load_experts
from mergekit_vision.export.formats import FORMATS
from mergekit_vision.export.manifest import ROUTERS, check_unchanged, read_record
from mergekit_vision.export.merged import open_merged
from mergekit_vision.export.output import CONTENTS, earlier_export, output_faults, own_files, write_contents
from mergekit_vision.export.writer import Writer
from mergekit_vision.support.console import logger
from mergekit_vision.support.faults import closest, raise_faults
from mergekit_vision.support.imports import import_by_path
from mergekit_vision.support.switching import replacing_set


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
    raise_faults(merged, writer.faults(model), brief=True)
    if earlier := earlier_export(output):
        logger.info("%s: replaces the %s", output, earlier)
    with _written(output), replacing_set(output, lambda: own_files(output), deciding=CONTENTS) as draft:
        logger.info("writing %s", FORMATS[to].text)
        writer.write(model, draft)
        check_unchanged(merged, record)
        logger.info("loading it again and comparing")
        difference = writer.difference(model, draft)
        if not difference <= TOLERANCE:
            raise InputError(
                f"{to}: embeddings of what was written differ from those of {merged} by {difference:.1e} of their norm, "
                f"more than {TOLERANCE:.0e}; it was removed. Please report this"
            )
        merge = {"suite": record["suite"], "method": record["merger"]["name"], "scale": record["scale"]}
        write_contents(draft, {"format": to, "base_only": base_only, "difference": difference, "merge": merge})
    return difference


@contextmanager
def _written(output: Path) -> Iterator[None]:
    """Name the directory when a file of it cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # a library's own
            raise
        reason = getattr(error, "strerror", None) or error
        problem = f"cannot be written ({reason}); what was there before is unchanged"
        raise InputError(f"`output` {output}: {problem}", of="command") from error


def check_request(merged: Path, to: str, output: Path, device: str, base_only: bool) -> None:
    """Refuse what cannot succeed, before anything large is read.

    Raises:
        InputError: that names every fault.
    """
    _checked_record(merged, verify=False)
    if to not in FORMATS:
        raise InputError(f"`to` {to}: not a format{closest(to, FORMATS)}; the formats are {', '.join(FORMATS)}", of="command")
    form, faults = FORMATS[to], [*output_faults(output), *_device_faults(to, device)]
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
    except (RuntimeError, AssertionError, ImportError) as error:
        return [f"`device` {device}: cannot be used ({str(error).splitlines()[0]})"]
    if torch.device(device).type != "cpu" and to != "torch":
        return [f"`device` {device}: of use to the format torch only; what {to} writes runs on any device"]
    return []
