"""The rows of a comparison's table, from what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.reports.summary import summarize
from mergekit_vision.runs.entries import Entry
from mergekit_vision.suites.splits import TEST


@dataclass(frozen=True)
class Measured:
    """What was found of one row.

    Attributes:
        name: of the row.
        entry: what was measured.
        settings: everything that makes it what it is, by name.
        differs: names among these of what is otherwise than by default.
    """

    name: str
    entry: Entry
    settings: Mapping[str, Any]
    differs: Sequence[str] = ()

    @property
    def mean(self) -> float:
        """Mean accuracy over its tasks, in [0, 1]."""
        accuracy = self.entry["accuracy"].values()
        return float(sum(accuracy) / len(accuracy))


def table_rows(
    bench: Workbench, zero_shot: Mapping[str, float], own: Mapping[str, float], methods: Sequence[Measured]
) -> list[dict[str, Any]]:
    """The rows of the table: the backbone, the methods by their mean accuracy, the experts; accuracies in [0, 1].

    Methods on fewer tasks come before the others: their means are of something else.
    """
    data = bench.evaluator.data
    sizes = {task: data.size(task, TEST) for task in data.task_names}
    model = sum(value.numel() for value in bench.base.values())

    def row(name: str, kind: str, accuracy: Mapping[str, float], **found: Any) -> dict[str, Any]:
        summary = summarize(accuracy, own, sizes)
        worst = min(summary["tasks"], key=lambda task: summary["tasks"][task]["normalized"] or 0.0)
        return {"name": name, "kind": kind, **summary, "worst": worst, **found}

    def method(found: Measured) -> dict[str, Any]:
        entry = {key: value for key, value in found.entry.items() if key != "dynamic"}
        kind = "dynamic" if found.entry["dynamic"] else "static"
        return row(found.name, kind, **entry, settings=dict(found.settings), differs=list(found.differs))

    return [
        row("zero-shot", "backbone", zero_shot, extra_parameters=0),
        *sorted(map(method, methods), key=lambda found: (len(found["tasks"]), found["mean"]["accuracy"])),
        row("experts", "experts", own, extra_parameters=(len(own) - 1) * model),
    ]
