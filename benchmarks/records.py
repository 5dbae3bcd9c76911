"""The one form of results: what was measured of a case, on what, in which units. One file holds one benchmark.

::

    {"schema": 1, "benchmark": "merging", "units": {"seconds": "s"}, "runs": [
      {"machine": {...}, "versions": {...}, "commit": "1f0c2a9", "date": "2026-11-27", "rows": [
        {"case": {"method": "ESM", "threads": 2}, "values": {"seconds": 158.5}, "spread": {"seconds": [155, 161.2]}, "repeats": 3}
    ]}]}

A value is the median of its repeats, and its spread their least and greatest. A row replaces one of the same case on the same
machine, whatever the versions and the commit; all others stay, with what they were measured on.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from mergekit_vision.support.files import replacing

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
WORKDIR = Path("runs") / "benchmarks"
Case = dict[str, str | int]


class Measure(NamedTuple):
    """What can be measured.

    Attributes:
        head: of a column; with the unit.
        unit: ``""`` of a plain number.
        better: which of two values is the better one.
        noise: relative difference of two runs that says nothing, where no repeats show it.
    """

    head: str
    unit: str
    better: Literal["lower", "higher"]
    noise: float


MEASURES = {
    "seconds": Measure("wall, s", "s", "lower", 0.15),
    "cpu_seconds": Measure("CPU, s", "s", "lower", 0.15),
    "forward_seconds": Measure("of it forward, s", "s", "lower", 0.3),
    "images_per_second": Measure("images/s", "images/s", "higher", 0.15),
    "images_per_cpu_second": Measure("images/CPU s", "images/s", "higher", 0.15),
    "peak_MiB": Measure("peak, MiB", "MiB", "lower", 0.05),
    "device_peak_MiB": Measure("device, MiB", "MiB", "lower", 0.05),
    "added_MiB": Measure("adds, MiB", "MiB", "lower", 0.01),
    "speedup": Measure("times faster", "x", "higher", 0.15),
    "cpu_speedup": Measure("by CPU time", "x", "higher", 0.15),
    "memory_saving": Measure("times less memory", "x", "higher", 0.05),
    "slowdown": Measure("times slower", "x", "lower", 0.15),
    "cpu_slowdown": Measure("by CPU time", "x", "lower", 0.15),
    "share": Measure("share of an evaluation", "", "lower", 0.15),
    "estimate": Measure("estimate / measured", "x", "higher", 0.3),
    "error": Measure("error", "", "lower", 2.0),
    "update_error": Measure("worst update's error", "", "lower", 2.0),
    "norm_error": Measure("mean singular value's error", "", "lower", 2.0),
    "accuracy": Measure("accuracy, %", "%", "higher", 0.01),
    "regret": Measure("accuracy lost, points", "points", "lower", 0.5),
}
"""Name -> measure. A benchmark records no other ones; which it is that a ratio compares with, its page says."""


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        case: parameters that the measurement depends on.
        values: keys of :data:`MEASURES` -> value.
        spread: those that were repeated -> least and greatest.
        repeats: how often it was measured.
        failed: why there are no values.
    """

    case: Case
    values: dict[str, float] = field(default_factory=dict)
    spread: dict[str, list[float]] = field(default_factory=dict)
    repeats: int = 1
    failed: str = ""

    @classmethod
    def of(cls, case: Case, samples: Mapping[str, Sequence[float]]) -> "Row":
        """A row from the repeats of each measure.

        >>> Row.of({"T": 8}, {"seconds": [3.0, 1.0, 2.00006]})
        Row(case={'T': 8}, values={'seconds': 2.0}, spread={'seconds': [1.0, 3.0]}, repeats=3, failed='')
        """
        values = {name: _short(median(found)) for name, found in samples.items()}
        spread = {name: [_short(min(found)), _short(max(found))] for name, found in samples.items() if len(found) > 1}
        return cls(case, values, spread, max(map(len, samples.values())))

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in a file."""
        return {name: value for name, value in asdict(self).items() if value or name in ("case", "values")}


def _short(value: float) -> float:
    """Four digits, of which the last is noise already."""
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Run:
    """Rows that were measured on the same machine, with the same code, on the same day."""

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str
    rows: list[Row] = field(default_factory=list)

    def comparable(self, other: "Run") -> bool:
        """Whether times of both can be compared: another version of this package is what one wants to compare."""
        ours, theirs = ([run.machine, *map(run.versions.get, ("python", "torch"))] for run in (self, other))
        return ours == theirs


def read(path: Path) -> list[Run]:
    """The runs in a file, of which there are none where it is missing."""
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path}: has schema {content.get('schema')}, not {SCHEMA}")
    return [Run(**{**run, "rows": [Row(**row) for row in run["rows"]]}) for run in content["runs"]]


def read_all(place: Path) -> dict[str, list[Run]]:
    """Benchmark -> runs, of a file or of all files in a folder."""
    files = [place] if place.is_file() else sorted(place.glob("*.json"))
    return {json.loads(path.read_text(encoding="utf-8")).get("benchmark"): read(path) for path in files}


def keep(path: Path, here: Run, rows: Iterable[Row]) -> None:
    """Add rows to a file, that of the benchmark with its name, where they replace those of the same cases and machine.

    Args:
        path: of the file; whole at any moment.
        here: what the rows were measured on.
    """
    rows = list(rows)
    fresh = [row.case for row in rows]

    def stay(run: Run) -> list[Row]:
        return [row for row in run.rows if row.case not in fresh or run.machine != here.machine]

    runs = [replace(run, rows=stay(run)) for run in read(path)]
    same = next((run for run in runs if replace(run, rows=[]) == replace(here, rows=[])), None)
    if same is None:
        runs.append(same := replace(here, rows=[]))
    same.rows.extend(rows)
    _write(path, [run for run in runs if run.rows])


def _write(path: Path, runs: list[Run]) -> None:
    used = {name for run in runs for row in run.rows for name in row.values}
    units = {name: measure.unit for name, measure in MEASURES.items() if name in used}
    if unknown := used - units.keys():
        raise ValueError(f"not in MEASURES: {', '.join(sorted(unknown))}")
    head = {"schema": SCHEMA, "benchmark": path.stem, "units": units}
    lines = []
    for run in runs:
        rows = ",\n".join(f"   {json.dumps(row.to_json())}" for row in run.rows)
        about = {name: value for name, value in asdict(run).items() if name != "rows"}
        lines.append(f'  {json.dumps(about)[:-1]}, "rows": [\n{rows}\n  ]}}')
    body = ",\n".join(lines)
    with replacing(path) as draft:
        draft.write_text(f'{json.dumps(head)[:-1]}, "runs": [\n{body}\n]}}\n', encoding="utf-8")


def parser(program: str, doc: str) -> argparse.ArgumentParser:
    """The command line of a benchmark, with the options that all have."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=doc.split("\n\n")[0])
    made.add_argument("--workdir", type=Path, default=WORKDIR, help="folder of made-up experts and images; kept between runs")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder whose file of this benchmark takes the rows")
    return made
