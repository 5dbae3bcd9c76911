"""What papers report of methods on the published suites.

``published/papers.json`` has a table for each source: the family of experts for which it holds, and rows of mean accuracies over
the tasks, in percent, by suite. A row names a method as plain data, with every setting that the number depends on.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_vision.suites.catalog import PublishedSuite, published
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.yaml_files import read_yaml

_AS_PUBLISHED = {"extends", "name", "tasks", "experts_root", "data_root"}  # keys that leave experts and texts as they are


class PublishedNumber(NamedTuple):
    """A mean accuracy that somebody reports.

    Attributes:
        of: ``"backbone"``, ``"experts"``, or a method as a file names it: ``class_path`` and ``init_args``.
        accuracy: mean over the tasks, in [0, 1].
        normalized: mean relative to the experts, where it is given.
        scale: the coefficient, where it was set and not searched.
        proxies: what the number presumes of the proxy images.
        remark: what else was done otherwise than here.
        source: who reports it.
        experts: of which experts.
        note: what holds for all numbers of the source.
    """

    of: str | Mapping[str, Any]
    accuracy: float
    normalized: float | None
    scale: float | None
    proxies: Mapping[str, Any]
    remark: str
    source: str
    experts: str
    note: str


def published_numbers(suite: Suite) -> list[PublishedNumber]:
    """The numbers that hold for a suite: a published one, or one that only says where the experts and data of one lie."""
    name = standard(suite.path)
    return [] if name is None else list(_numbers(*name.split("/")))


def standard(path: Path) -> str | None:
    """The published suite whose tasks, experts and texts a suite file has, if it is those of one."""
    name = next((name for name, file in published().items() if file == path), None)
    if name is not None:
        return name
    own = read_yaml(path)
    base = own.get("extends")
    if base not in published() or not own.keys() <= _AS_PUBLISHED:
        return None
    known, tasks = PublishedSuite.load(base).tasks, own.get("tasks", {})
    only_data = all(name in known and task is not None and task.keys() <= {"data"} for name, task in tasks.items())
    return str(base) if only_data else None


def _numbers(family: str, suite: str) -> Iterator[PublishedNumber]:
    for table in _tables():
        if table["family"] != family or suite not in table["suites"]:
            continue
        column = table["suites"].index(suite)
        for row in table["rows"]:
            if row["accuracy"][column] is not None:
                yield PublishedNumber(
                    row.get("row") or row["merger"],
                    row["accuracy"][column] / 100,
                    row["normalized"][column] / 100 if "normalized" in row else None,
                    row.get("scale"),
                    row.get("proxies", {}),
                    row.get("remark", ""),
                    table["source"],
                    table["experts"],
                    table["note"],
                )


@cache
def _tables() -> list[dict[str, Any]]:
    path = Path(__file__).parent / "published" / "papers.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found
