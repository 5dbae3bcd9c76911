"""What stands out in a comparison: its best rows, and the papers whose numbers are beside them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_vision.reports.noise import is_better


class Best(NamedTuple):
    """The row of a kind with the highest mean accuracy.

    Attributes:
        row: the row.
        rivals: names of those of its kind that are behind it by no more than noise.
        others: how many there are of its kind besides.
    """

    row: Mapping[str, Any]
    rivals: Sequence[str]
    others: int


def best_rows(results: Mapping[str, Any]) -> dict[str, Best]:
    """The best row of each kind, among those on all tasks."""
    most = max(len(row["tasks"]) for row in results["rows"])
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in results["rows"]:
        if len(row["tasks"]) == most:
            kinds.setdefault(row["kind"], []).append(row)
    found = {kind: max(rows, key=lambda row: float(row["mean"]["accuracy"])) for kind, rows in kinds.items()}
    return {
        kind: Best(
            row, [other["name"] for other in kinds[kind] if other is not row and not is_better(row, other)], len(kinds[kind]) - 1
        )
        for kind, row in found.items()
    }


class Papers(NamedTuple):
    """Where the papers' numbers in the table are from.

    Attributes:
        source: who reports them.
        experts: for which experts they hold.
        note: what holds for all of them.
        remarks: what was done otherwise -> names of the rows.
    """

    source: str
    experts: str
    note: str
    remarks: Mapping[str, Sequence[str]]


def papers_of(results: Mapping[str, Any]) -> list[Papers]:
    """The sources of the papers' numbers in the table."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in results["rows"]:
        if number := row.get("published"):
            remarks = found.setdefault((number["source"], number["experts"], number["note"]), {})
            scale = f"at the coefficient {number['scale']:g}" if number["scale"] is not None else ""
            if remark := "; ".join(filter(None, (scale, number["remark"]))):
                remarks.setdefault(remark, []).append(row["name"])
    return [Papers(*source, remarks) for source, remarks in found.items()]
