"""What a coefficient chosen without labels costs: test accuracy lost against the best coefficient that test labels could pick.

For every method, number of proxy images and draw of them: the merged model at every coefficient of a grid, its accuracy on the
test split, and which coefficient each rule chooses by how the model agrees with the experts on the proxy images. Where a method
fits on proxy images, a second time: fitted on half of them, with the rules choosing on the others::

    python -m benchmarks.agreement --suites demo path/to/suite.yaml
"""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.machine import Recorder
from benchmarks.records import Row
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.evaluation.evaluator import Evaluator, Runtime
from mergekit_vision.evaluation.metric import TaskMetric
from mergekit_vision.merger import Merged, merged_weights
from mergekit_vision.merging.agreement import Agreement, ExpertTeachers
from mergekit_vision.merging.record import needs_images
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.registry import get
from mergekit_vision.suites.splits import TEST
from mergekit_vision.suites.suite import Suite

GRID = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0)
RULES: dict[str, Callable[[Agreement], float]] = {
    "share": lambda found: found.share,
    "cosine": lambda found: fmean(found.cosine.values()),
    "divergence": lambda found: -found.distance,
    "share + 0.2 cosine": lambda found: found.share + 0.2 * fmean(found.cosine.values()),
    "divergence x distance": lambda found: -found.distance * math.sqrt(2 - 2 * min(1.0, fmean(found.cosine.values()))),
}


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


def measure(
    suite: str, name: str, counts: Sequence[int], seeds: Sequence[int], most: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """What each rule loses with one method, for a number of proxy images and a draw of them each."""
    bench, merger = opened(suite), get(name)()
    images = test_images(bench, most)
    experts = {task: bench.evaluator.expert(task) for task in bench.evaluator.data.suite.tasks}
    fits = needs_images(merger)
    known: dict[Proxies | None, tuple[Merged, list[float]]] = {}

    def lost(fitted: Proxies, judged: Proxies) -> dict[str, float]:
        key = fitted if fits else None
        if key not in known:
            merged = drawn(bench, fitted).merge(merger, experts)
            known[key] = merged, test_curve(bench, merged, images)
        merged, curve = known[key]
        return regrets(proxy_curve(drawn(bench, judged), merged), curve)

    for proxies in (Proxies(n=n, seed=seed) for n in counts for seed in seeds):
        found = lost(proxies, proxies)
        if fits:
            found |= {f"{rule}, half held out": value for rule, value in lost(*proxies.halves()).items()}
        yield proxies.n, found


def rows(suite: str, name: str, counts: Sequence[int], seeds: Sequence[int], most: int) -> Iterator[Row]:
    """A row for each number of proxy images and rule; the draws are the repeats."""
    found = list(measure(suite, name, counts, seeds, most))
    for count, rule in dict.fromkeys((count, rule) for count, regret in found for rule in regret):
        case: records.Case = {"suite": Suite.load(suite).name, "method": name, "proxies": count, "rule": rule}
        yield Row.of(case, {"regret": [regret[rule] for n, regret in found if n == count]})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep the rows."""
    parser = records.parser("agreement", __doc__)
    parser.add_argument("--suites", nargs="+", default=["demo"], help="suites with val and test splits")
    parser.add_argument("--methods", nargs="+", default=["TaskArithmetic", "TIES", "TSVM", "ESM", "IsoC", "DCMerge"])
    parser.add_argument("--proxies", nargs="+", type=int, default=[8, 32], help="images a task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="draws of the proxy images")
    parser.add_argument("--images", type=int, default=1000, help="test images a task, at most")
    options = parser.parse_args(arguments)
    recorder = Recorder("agreement", options.results)
    for suite in options.suites:
        for name in options.methods:
            recorder.keep(rows(suite, name, options.proxies, options.seeds, options.images))
    print(f"written: {recorder.path}")


if __name__ == "__main__":
    main()
