"""Names the cases that got slower, larger or less exact than in an earlier run by more than the noise.

    python -m benchmarks.compare OLD NEW          # files of results, or folders of them
    python -m benchmarks.compare OLD NEW --fail   # exit status 1 where there is one

Compared are equal cases on the same machine with the same versions of Python and torch. Where both were repeated three times or
more, a value is worse when even the best of its repeats is worse than the worst before, by five percent; otherwise by the
relative difference that :data:`benchmarks.records.MEASURES` calls noise.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.records import MEASURES, Case, Row, Run, read_all

ENOUGH = 3
LEAST = 0.05


class Worse(NamedTuple):
    """A measure of a case that got worse; without a name where the case fails now."""

    benchmark: str
    case: Case
    measure: str
    before: float
    now: float
    failed: str = ""

    def __str__(self) -> str:
        case = ", ".join(f"{name} {value}" for name, value in self.case.items())
        if self.failed:
            return f"{self.benchmark}, {case}: fails now: {self.failed}"
        unit = MEASURES[self.measure].unit
        change = f" ({self.now / self.before - 1:+.0%})" if self.before else ""
        return f"{self.benchmark}, {case}: {self.measure} {self.before:g} {unit} -> {self.now:g} {unit}{change}"


def pairs(old: Sequence[Run], new: Sequence[Run]) -> Iterator[tuple[Row, Row]]:
    """Rows of the same case that can be compared, of which the later one was measured anew."""
    for run in new:
        known = [row for other in old if other.comparable(run) for row in other.rows]
        for row in run.rows:
            yield from ((before, row) for before in known if before.case == row.case and before != row)


def worse(old: Mapping[str, Sequence[Run]], new: Mapping[str, Sequence[Run]]) -> Iterator[Worse]:
    """What got worse, by benchmark -> runs."""
    for benchmark, runs in new.items():
        for before, row in pairs(old.get(benchmark, ()), runs):
            if row.failed and not before.failed:
                yield Worse(benchmark, row.case, "", 0.0, 0.0, row.failed)
            for name in before.values.keys() & row.values.keys():
                if _is_worse(name, before, row):
                    yield Worse(benchmark, row.case, name, before.values[name], row.values[name])


def _is_worse(name: str, before: Row, row: Row) -> bool:
    sign = 1 if MEASURES[name].better == "lower" else -1
    if min(before.repeats, row.repeats) >= ENOUGH:
        old, new = (_range(found, name) for found in (before, row))
        worst, best = (old[1], new[0]) if sign > 0 else (old[0], new[1])
        return sign * (best - worst) > LEAST * abs(worst)
    old_value, new_value = before.values[name], row.values[name]
    factor = 1 + MEASURES[name].noise
    return new_value > old_value * factor if sign > 0 else new_value * factor < old_value


def _range(row: Row, name: str) -> tuple[float, float]:
    low, high = row.spread.get(name, [row.values[name]] * 2)
    return low, high


def report(old: Mapping[str, Sequence[Run]], new: Mapping[str, Sequence[Run]]) -> list[Worse]:
    """Print what got worse, and what was compared."""
    compared = sum(1 for name, runs in new.items() for _ in pairs(old.get(name, ()), runs))
    found = sorted(worse(old, new), key=str)
    for one in found:
        print(f"worse: {one}")
    cases = {(one.benchmark, str(one.case)) for one in found}
    print(f"{compared} cases compared with an earlier run, {len(cases)} of them worse than the noise")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Compare, print, and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("old", type=Path, help="file or folder of results")
    parser.add_argument("new", type=Path, help="the same of a later run")
    parser.add_argument("--fail", action="store_true", help="exit with status 1 where something got worse")
    options = parser.parse_args(arguments)
    for path in (options.old, options.new):
        if not path.exists():
            parser.error(f"{path}: no such file or folder")
    found = report(read_all(options.old), read_all(options.new))
    return 1 if found and options.fail else 0


if __name__ == "__main__":
    raise SystemExit(main())
