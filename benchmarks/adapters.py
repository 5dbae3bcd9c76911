"""What one choice an image costs: accuracies of dynamic models, and of the same experts as adapters for ``peft``.

For every method, the mean test accuracy of the static base, of the merged model, of its ``peft`` export, whose ``example.py``
chooses one adapter for each image, and of the model told each image's true task::

    python -m benchmarks.adapters demo
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.machine import Recorder
from benchmarks.records import Row
from mergekit_vision import MergedCLIP, Trainer, VisionTasks
from mergekit_vision.encoders.routed import Route
from mergekit_vision.evaluation.evaluator import Evaluator, Runtime
from mergekit_vision.export.directory import load_experts
from mergekit_vision.export.exporting import export_model
from mergekit_vision.export.manifest import read_record
from mergekit_vision.export.peft import Peft
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.registry import get
from mergekit_vision.suites.splits import TEST
from mergekit_vision.suites.suite import Suite

METHODS = ("ESMPP", "ESMPPBayes", "SMILE")
ROUTES: dict[str, Route] = {"base": "base", "as merged": "router", "true expert": "oracle"}


class Adapted:
    """An exported base with adapters in place of an encoder."""

    routing = None

    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        self._embed = embed

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings of images, each by the adapter that was chosen for it."""
        return self._embed(images)


def mean(evaluator: Evaluator) -> float:
    """Mean test accuracy in %."""
    found = [evaluator.accuracy(task, TEST) for task in evaluator.data.task_names]
    return 100 * sum(found) / len(found)


def measure(suite: str, method: str, place: Path) -> Iterator[tuple[str, float]]:
    """Which way to choose, and its accuracy; what is written lies in ``place`` afterwards."""
    data, merged = VisionTasks(suite, batch_size=500), place / method
    Trainer(default_root_dir=str(merged), accelerator="cpu").merge(MergedCLIP(get(method)()), data)
    export_model(merged, "peft", place / f"{method}-peft")
    bench = Workbench.open(data, Runtime(torch.device("cpu")), merged)
    routed, experts = load_experts(merged), list(read_record(merged)["experts"])
    for name, route in ROUTES.items():
        with bench.evaluator.with_model(bench.base, routed, experts, route) as evaluator:
            yield name, mean(evaluator)
    adapted: Any = Adapted(Peft().load(place / f"{method}-peft"))
    yield "once per image", mean(replace(bench.evaluator, encoder=adapted))


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep the rows."""
    parser = records.parser("adapters", __doc__)
    parser.add_argument("suite", help="demo, or the file of a suite")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args(arguments)
    recorder = Recorder("adapters", options.results)
    for method in options.methods:
        with TemporaryDirectory() as place:
            about: records.Case = {"suite": Suite.load(options.suite).name, "method": method}
            found = measure(options.suite, method, Path(place))
            recorder.keep([Row.of({**about, "choice": choice}, {"accuracy": [value]}) for choice, value in found])
    print(f"written: {recorder.path}")


if __name__ == "__main__":
    main()
