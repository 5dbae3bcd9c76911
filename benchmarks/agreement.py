"""What a coefficient chosen without labels costs: test accuracy lost against the best coefficient that test labels could pick.

For every method, number of proxy images and draw of them: the merged model at every coefficient of a grid, its accuracy on the
test split, and which coefficient each rule chooses by how the model agrees with the experts on the proxy images. Where a method
fits on proxy images, a second time: fitted on half of them, with the rules choosing on the others::

    python -m benchmarks.agreement --suites demo path/to/suite.yaml
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import write
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.evaluation.evaluator import Evaluator, Runtime
from mergekit_vision.evaluation.metric import TaskMetric
from mergekit_vision.merger import Merged, merged_weights
from mergekit_vision.merging.agreement import Agreement, ExpertTeachers
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.registry import get
from mergekit_vision.suites.splits import TEST

GRID = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0)
RULES: dict[str, Callable[[Agreement], float]] = {
    "share": lambda found: found.share,
    "cosine": lambda found: fmean(found.cosine.values()),
    "divergence": lambda found: -fmean(found.divergence.values()),
    "share + 0.2 cosine": lambda found: found.share + 0.2 * fmean(found.cosine.values()),
    "distance": lambda found: -found.distance,
}
Row = dict[str, Any]


def opened(suite: str) -> Workbench:
    """A workbench of the suite."""
    return Workbench.open(VisionTasks(suite, batch_size=500), Runtime(torch.device("cpu")))


def drawn(bench: Workbench, proxies: Proxies) -> Workbench:
    """The same workbench with other proxy images."""
    data = bench.evaluator.data
    return bench.on(data.variant(proxies, data.task_names))


def scaled(bench: Workbench, merged: Merged) -> Iterator[Evaluator]:
    """The merged model at each coefficient of the grid."""
    for coefficient in GRID:
        with bench.evaluator.with_model(merged_weights(bench.base, merged, coefficient)) as evaluator:
            yield evaluator


Images = dict[str, list[tuple[Tensor, Tensor]]]
"""Task -> batches of preprocessed images and labels."""


def test_images(bench: Workbench, most: int) -> Images:
    """Test images, at equal distances where a task has more than ``most``; decoded once."""
    data = bench.evaluator.data
    every = {task: -(-data.size(task, TEST) // most) for task in data.task_names}
    return {
        task: [(images[::step].clone(), labels[::step]) for images, labels in data.loader(task, TEST)]
        for task, step in every.items()
    }


@torch.inference_mode()
def test_curve(bench: Workbench, merged: Merged, images: Images) -> list[float]:
    """Mean test accuracy in % at each coefficient of the grid."""
    return [100 * fmean(accuracy(evaluator, task, images[task]) for task in images) for evaluator in scaled(bench, merged)]


def accuracy(evaluator: Evaluator, task: str, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Accuracy in [0, 1] on some batches."""
    metric = TaskMetric()
    for images, labels in batches:
        evaluator.step(metric, images, labels, task)
    right, seen = metric.compute().tolist()
    return float(right / seen)


def proxy_curve(bench: Workbench, merged: Merged) -> list[Agreement]:
    """Agreement with the experts on the workbench's proxy images at each coefficient of the grid."""
    teachers = ExpertTeachers(bench.evaluator, list(bench.evaluator.data.suite.tasks))
    return [teachers.agreement(evaluator) for evaluator in scaled(bench, merged)]


def regrets(found: Sequence[Agreement], curve: Sequence[float]) -> dict[str, float]:
    """Test accuracy that each rule loses, in points."""
    chosen = {rule: max(range(len(GRID)), key=lambda at: score(found[at])) for rule, score in RULES.items()}
    return {rule: max(curve) - curve[at] for rule, at in chosen.items()}


def measure(suite: str, name: str, counts: Sequence[int], seeds: Sequence[int], most: int) -> Iterator[Row]:
    """Rows of one method: a number of proxy images and a draw each."""
    bench, merger = opened(suite), get(name)()
    images = test_images(bench, most)
    experts, fits = bench.evaluator.data.suite.experts, merger.needs == "proxies"
    known: dict[Proxies | None, tuple[Merged, list[float]]] = {}

    def lost(fitted: Proxies, judged: Proxies) -> tuple[dict[str, float], list[float]]:
        key = fitted if fits else None
        if key not in known:
            merged = drawn(bench, fitted).merge(merger, experts)
            known[key] = merged, test_curve(bench, merged, images)
        merged, curve = known[key]
        return regrets(proxy_curve(drawn(bench, judged), merged), curve), curve

    for proxies in (Proxies(n=n, seed=seed) for n in counts for seed in seeds):
        found, curve = lost(proxies, proxies)
        if fits:
            found |= {f"{rule}, half held out": value for rule, value in lost(*proxies.halves())[0].items()}
        yield {
            "suite": bench.evaluator.data.suite.name,
            "method": name,
            "proxies": proxies.n,
            "seed": proxies.seed,
            "best": round(max(curve), 2),
            "coefficient": GRID[curve.index(max(curve))],
            "regret": {rule: round(value, 2) for rule, value in found.items()},
        }


def summary(rows: Sequence[Row]) -> Table:
    """Mean and worst regret of each rule, over everything and by method, in points."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    table = Table("rule", "all", *methods)
    for rule in dict.fromkeys(rule for row in rows for rule in row["regret"]):
        lost = {
            name: [row["regret"][rule] for row in rows if row["method"] == name and rule in row["regret"]] for name in methods
        }
        every = [value for values in lost.values() for value in values]
        cells = (f"{fmean(values):.2f} / {max(values):.2f}" if values else "–" for values in (every, *lost.values()))
        table.add_row(rule, *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the rows and print the summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__.split("\n\n")[0])
    parser.add_argument("--suites", nargs="+", default=["demo"], help="suites with val and test splits")
    parser.add_argument("--methods", nargs="+", default=["TaskArithmetic", "TIES", "TSVM", "ESM", "IsoC", "DCMerge"])
    parser.add_argument("--proxies", nargs="+", type=int, default=[8, 32], help="images a task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="draws of the proxy images")
    parser.add_argument("--images", type=int, default=1000, help="test images a task, at most")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for suite in options.suites:
        for name in options.methods:
            rows += measure(suite, name, options.proxies, options.seeds, options.images)
        Console().print(summary(rows))
    print(f"written: {write('agreement', torch.device('cpu'), rows, ('suite', 'method', 'proxies', 'seed'))}")


if __name__ == "__main__":
    main()
