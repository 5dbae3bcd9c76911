"""The papers' numbers beside ours."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_vision.merging.record import merger_record
from mergekit_vision.runs.building import build_merger
from mergekit_vision.runs.variants import parameters
from mergekit_vision.suites.papers import PublishedNumber

Row = Mapping[str, Any]


def with_papers(rows: Iterable[Row], tasks: int, numbers: Sequence[PublishedNumber]) -> list[dict[str, Any]]:
    """Rows with the number that a paper reports for the same method and settings as ``published``, where there is one.

    Args:
        rows: of a comparison.
        tasks: of the suite; a row on fewer gets no number.
        numbers: that hold for the suite.
    """
    return [{**row, "published": _found(row, numbers) if len(row["tasks"]) == tasks else None} for row in rows]


def _found(row: Row, numbers: Sequence[PublishedNumber]) -> dict[str, Any] | None:
    number = next((number for number in numbers if _is_of(number, row)), None)
    if number is None:
        return None
    keys = ("accuracy", "normalized", "scale", "remark", "source", "experts", "note")
    return {key: getattr(number, key) for key in keys}


def _is_of(number: PublishedNumber, row: Row) -> bool:
    """Whether a number is of a row's method with the row's settings."""
    if isinstance(number.of, str) or "settings" not in row:
        return bool(number.of == row["kind"])
    try:
        merger = build_merger(number.of)
    except ValueError:  # not installed, or of other parameters now
        return False
    given = row["settings"]
    if merger_record(merger)["class_path"] != row["merger"]["class_path"] or given["route"] != "router":
        return False
    if given.get("expert_dtype", "float32") != "float32":
        return False
    wanted = {**parameters(merger), **{f"proxies.{name}": value for name, value in number.proxies.items()}}
    own = {name for name in given if name not in ("scale", "route", "expert_dtype", "tasks") and not name.startswith("proxies.")}
    scaled = isinstance(given["scale"], str) or given["scale"] == number.scale
    return scaled and own <= wanted.keys() and all(name in given and given[name] == value for name, value in wanted.items())
