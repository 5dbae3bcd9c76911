"""The rows of a comparison's table, from what was measured."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
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
        entries: what was measured, by the seed of the proxy images; with more than one seed, in the order of the draws.
        settings: everything that makes it what it is, by name.
        differs: names among these of what is otherwise than by default.
    """

    name: str
    entries: Mapping[int, Entry]
    settings: Mapping[str, Any]
    differs: Sequence[str] = ()

    @property
    def first(self) -> Entry:
        """What was measured with the first draw."""
        return next(iter(self.entries.values()))

    @property
    def accuracy(self) -> dict[str, float]:
        """Mean accuracy over the draws, by task, in [0, 1]."""
        return {task: fmean(entry["accuracy"][task] for entry in self.entries.values()) for task in self.first["accuracy"]}

    @property
    def draws(self) -> list[dict[str, Any]]:
        """What was found with each draw; nothing where there was one."""
        found = [
            {
                "seed": seed,
                "scale": entry["scale"],
                "tasks": {task: {"accuracy": value} for task, value in entry["accuracy"].items()},
                "mean": {"accuracy": fmean(entry["accuracy"].values())},
            }
            for seed, entry in self.entries.items()
        ]
        return found if len(found) > 1 else []


def table_rows(
    bench: Workbench,
    zero_shot: Mapping[str, float],
    own: Mapping[str, float],
    methods: Sequence[Measured],
    merged: Collection[str],
) -> list[dict[str, Any]]:
    """The rows of the table: the backbone, the methods by their mean accuracy, oracles, the experts; accuracies in [0, 1].

    Methods on fewer tasks come before the others: their means are of something else. Oracles, which are told each image's task,
    come apart, by their bytes a task. The last row keeps the experts of all tasks that are ``merged`` or evaluated.
    """
    data = bench.evaluator.data
    sizes = {task: data.size(task, TEST) for task in data.task_names}
    model = sum(value.numel() for value in bench.base.values())

    def row(name: str, kind: str, accuracy: Mapping[str, float], **found: Any) -> dict[str, Any]:
        summary = summarize(accuracy, own, sizes)
        worst = min(summary["tasks"], key=lambda task: summary["tasks"][task]["normalized"] or 0.0)
        return {"name": name, "kind": kind, **summary, "worst": worst, **found}

    def method(found: Measured) -> dict[str, Any]:
        kind = "oracle" if found.first["oracle"] else "dynamic" if found.first["dynamic"] else "static"
        entry = {key: value for key, value in found.first.items() if key not in ("dynamic", "oracle", "accuracy")}
        more = {"settings": dict(found.settings), "differs": list(found.differs), "draws": found.draws}
        return row(found.name, kind, found.accuracy, **entry, **more)

    measured = list(map(method, methods))
    return [
        row("zero-shot", "backbone", zero_shot, extra_parameters=0),
        *sorted(
            (found for found in measured if found["kind"] != "oracle"),
            key=lambda found: (len(found["tasks"]), found["mean"]["accuracy"]),
        ),
        *sorted((found for found in measured if found["kind"] == "oracle"), key=lambda found: int(found["bytes"]["task"])),
        row("experts", "experts", own, extra_parameters=(len({*own, *merged}) - 1) * model),
    ]
