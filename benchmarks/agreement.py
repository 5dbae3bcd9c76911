"""What a coefficient chosen without labels costs: test accuracy lost against the best coefficient that test labels could pick.

For every method, number of proxy images and draw of them: the merged model at every coefficient of a grid, its accuracy on the
test split, and which coefficient ``--scale agreement`` chooses, by divergence; the share of images on which model and expert name
the same class is listed beside it. Where a method fits on the proxy images, the choice is also made on another draw, as ``held
out``::

    python -m benchmarks.agreement --suite demo
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import write
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.merger import Merged, Merger, merged_weights
from mergekit_vision.merging.agreement import Agreement, ExpertTeachers
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.registry import get
from mergekit_vision.suites.splits import TEST

GRID = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 2.0, 3.0)
RULES: dict[str, Callable[[Agreement], float]] = {
    "divergence": lambda found: -found.mean_divergence,
    "share": lambda found: found.share,
}
Row = dict[str, Any]


def opened(suite: str, n: int, seed: int) -> Workbench:
    """A workbench of the suite with its proxy images."""
    data = VisionTasks(suite, batch_size=500, proxies=Proxies(n=n, seed=seed))
    return Workbench.open(data, Runtime(torch.device("cpu")))


def test_curve(bench: Workbench, merged: Merged) -> list[float]:
    """Mean test accuracy in % at each coefficient of the grid."""
    found = []
    for coefficient in GRID:
        with bench.evaluator.with_model(merged_weights(bench.base, merged, coefficient)) as evaluator:
            accuracy = [evaluator.accuracy(task, TEST) for task in evaluator.data.task_names]
        found.append(100 * sum(accuracy) / len(accuracy))
    return found


def choices(bench: Workbench, merged: Merged) -> dict[str, float]:
    """The coefficient that each rule chooses on a workbench's proxy images."""
    teachers, found = ExpertTeachers(bench.evaluator, list(bench.evaluator.data.suite.tasks)), []
    for coefficient in GRID:
        with bench.evaluator.with_model(merged_weights(bench.base, merged, coefficient)) as evaluator:
            found.append(teachers.agreement(evaluator))
    return {rule: GRID[max(range(len(GRID)), key=lambda at: score(found[at]))] for rule, score in RULES.items()}


def measure(suite: str, name: str, counts: Sequence[int], seeds: Sequence[int]) -> Iterator[Row]:
    """Rows of one method: a rule, a number of proxy images and a draw each."""
    merger: Merger = get(name)()
    fits, curves = merger.needs == "proxies", dict[str, list[float]]()
    for n in counts:
        for seed in seeds:
            bench = opened(suite, n, seed)
            merged = bench.merge(merger, bench.evaluator.data.suite.experts)
            key = f"{n} {seed}" if fits else ""
            if key not in curves:
                curves[key] = test_curve(bench, merged)
            chosen = choices(bench, merged)
            if fits:  # another draw of as many, most of them unseen
                chosen["held out"] = choices(opened(suite, n, seed + 1000), merged)[next(iter(RULES))]
            best, curve = max(curves[key]), curves[key]
            for rule, coefficient in chosen.items():
                accuracy = curve[GRID.index(coefficient)]
                row = {"rule": rule, "coefficient": coefficient, "accuracy": accuracy, "best": best, "regret": best - accuracy}
                yield {"suite": Path(suite).parent.name or suite, "method": name, "proxies": n, "seed": seed, **row}


def summary(rows: Sequence[Row]) -> Table:
    """Mean and worst regret of each rule, over everything and by method, in points."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table("rule", "mean", "worst", *methods)
    for rule in dict.fromkeys(row["rule"] for row in rows):
        regrets = {name: [row["regret"] for row in rows if (row["rule"], row["method"]) == (rule, name)] for name in methods}
        every = [regret for found in regrets.values() for regret in found]
        by_method = (f"{sum(found) / len(found):.2f} / {max(found):.2f}" if found else "–" for found in regrets.values())
        table.add_row(rule, f"{sum(every) / len(every):.2f}", f"{max(every):.2f}", *by_method)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the rows and print the summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__.split("\n\n")[0])
    parser.add_argument("--suite", default="demo", help="a suite with val and test splits")
    parser.add_argument("--methods", nargs="+", default=["TaskArithmetic", "TIES", "TSVM", "ESM", "IsoC", "DCMerge"])
    parser.add_argument("--proxies", nargs="+", type=int, default=[8, 32], help="images a task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="draws of the proxy images")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for name in options.methods:
        rows += measure(options.suite, name, options.proxies, options.seeds)
        Console().print(summary(rows))
    print(f"written: {write('agreement', torch.device('cpu'), rows, ('suite', 'method', 'proxies', 'seed', 'rule'))}")


if __name__ == "__main__":
    main()
