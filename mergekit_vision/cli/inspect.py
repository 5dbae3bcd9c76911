"""``mergekit-vision inspect``: what a checkpoint is, and whether it can be an expert."""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from mergekit_vision.cli.plain_parser import PlainParser, place
from mergekit_vision.errors import InputError

if TYPE_CHECKING:
    from mergekit_vision.runs.inspection import Inspection

_BARS = " ▁▂▃▄▅▆▇█"


def inspect(arguments: list[str]) -> None:
    """Print what a checkpoint is.

    Args:
        arguments: of the command.

    Raises:
        InputError: for anything the user can correct, and when the checkpoint cannot be an expert, after what it is was printed.
        SystemExit: after ``--help``.
    """
    chosen = parser().parse_args(arguments)
    from mergekit_vision.runs.inspection import inspect_checkpoint
    from mergekit_vision.support.console import console_output

    options = {name: getattr(chosen, name) for name in ("kind", "key", "ema", "scale")}
    with console_output():
        found = inspect_checkpoint(chosen.checkpoint, chosen.suite, chosen.allow_code, **options)
    print(_as_json(found) if chosen.json else "\n".join(_lines(found)))
    if found.refused:
        raise InputError(f"not an expert: {found.refused}")


def parser() -> PlainParser:
    """The parser of the command's options."""
    parser = PlainParser("inspect", "Show what a checkpoint holds, and whether it can be an expert.")
    parser.add_argument("checkpoint", metavar="PATH_OR_ID", help="file, directory, or hf-hub:org/name[@revision][:path/in/repo]")
    parser.add_argument("-s", "--suite", type=place, metavar="FILE", help="suite whose backbone it is compared with")
    kinds = ("auto", "weights", "delta", "lora")
    parser.add_argument("--kind", choices=kinds, default="auto", help="what it holds; found out unless given, differences aside")
    parser.add_argument("--key", metavar="PREFIX", help="beginning of the tower's names, where it holds several")
    parser.add_argument("--ema", action="store_true", default=None, help="take averaged weights")
    parser.add_argument("--scale", type=_finite, help="factor of differences, or of a LoRA adapter's B A")
    parser.add_argument("--allow-code", action="store_true", help="import data set classes that the suite names: trust it first")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


def _finite(text: str) -> float:
    """A number that weights can be multiplied by.

    Raises:
        ArgumentTypeError: for any other text, NaN and infinity.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"is {text}, but must be a finite number")
    return value


def _as_json(found: "Inspection") -> str:
    changes = {linear.name: _number(value) for linear, value in found.changes.items()}
    whole = None if found.whole is None else {name: _number(value) for name, value in found.whole._asdict().items()}
    plain = {**asdict(found), "whole": whole, "changes": changes}
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)


def _number(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None


def _lines(found: "Inspection") -> Iterator[str]:
    for file, size in found.files.items():
        yield f"file          {file}, {size / 1e6:,.1f} MB"
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes.items())
    yield f"container     {found.container}: {found.tensors} tensors ({dtypes}), {found.numbers:,} numbers"
    if found.origin:
        yield f"holds         {_held(found)}"
    if found.architecture:
        sizes = ", ".join(f"{name} {value}" for name, value in found.architecture.items())
        models = f"; as {', '.join(found.models[:4])}" if found.models else ""
        yield f"architecture  {sizes}{models}"
    if unused := found.origin.get("unused"):
        yield f"not used      {', '.join(unused[:6])}{' …' if len(unused) > 6 else ''}"
    if "projection" in found.origin:
        yield "projection    none; it gets the backbone's"
    for remark in found.remarks:
        yield f"remark        it {remark}"
    if found.whole is not None:
        cosine, difference, _ = found.whole
        yield f"backbone      cosine {cosine:.4f}, norm of the difference {difference:.3g} of the backbone's"
    if found.changes:
        yield from _picture(found)


def _held(found: "Inspection") -> str:
    """The kind of expert, whose names it uses, and what else its file says."""
    origin = found.origin
    parts = [f"{origin['kind']} ({origin['family']})"]
    parts += [f"{name} {origin[name]}" for name in ("rank", "scale", "activation", "base_model", "names") if origin.get(name)]
    return ", ".join(parts)


def _picture(found: "Inspection") -> Iterator[str]:
    """How much each Linear layer was changed: a row a block, a column a kind of layer, bars up to the largest change."""
    kinds = list(dict.fromkeys(linear.kind for linear in found.changes))
    largest = max((value for value in found.changes.values() if math.isfinite(value)), default=0.0) or 1.0
    yield f"change of each layer relative to its weight ({_BARS[-1]} is {largest:.3g})"
    yield f"{'block':>13} " + " ".join(f"{kind:>11}" for kind in kinds)
    for block in sorted({linear.block for linear in found.changes}):
        row = {linear.kind: value for linear, value in found.changes.items() if linear.block == block}
        cells = [f"{row[kind]:>9.3g} {_bar(row[kind] / largest)}" for kind in kinds]
        yield f"{block:>13} " + " ".join(cells)


def _bar(share: float) -> str:
    return _BARS[round(share * (len(_BARS) - 1))] if math.isfinite(share) else "!"
