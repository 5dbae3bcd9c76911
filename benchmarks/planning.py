"""What ``plan`` estimates beside what it takes: time of merging, search and evaluation, and memory.

    python -m benchmarks.planning --suites demo ../shared/zoo/suite.yaml
    python -m benchmarks.planning --model ViT-B-32 --methods TSVM --parts merge

Each method runs in a process of its own, so that its peak of memory is not another's. Estimate and measurement count seconds of
the processor by default, which others that are at work on the machine disturb less; with several threads give ``--clock wall``.
Run it after a change of a kernel: the constants to adjust are those of :mod:`mergekit_vision.merging.costs`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.evaluation import suite as made_up
from benchmarks.machine import Recorder
from benchmarks.meter import MIB, Meter
from benchmarks.records import Row
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.merger import Merged, merged_weights
from mergekit_vision.merging.coefficient import ScaleChoice
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.registry import default_mergers, mergers
from mergekit_vision.runs.planning import Options, Planning
from mergekit_vision.suites.suite import Suite

ROOT = Path(__file__).parents[1]
RESULT = "result: "
CLOCKS: Mapping[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
PARTS = ("merge", "search", "evaluation")
Found = dict[str, float]


def estimated(suite: str, methods: list[str], clock: str, proxies: int) -> dict[str, Found]:
    """What the plan says of each method."""
    found = Planning(Suite.load(suite), default_mergers(methods), Options(proxies)).content(CLOCKS[clock])
    return dict(found["estimate"]["methods"])


def measured(suite: str, method: str, parts: list[str], clock: str) -> Found:
    """The same of a run, in this process."""
    now, device = CLOCKS[clock], torch.device("cpu")
    row: Found = {}
    with Meter(device) as meter:
        bench = Workbench.open(VisionTasks(suite), Runtime(device))
        tasks = bench.evaluator.data.task_names
        experts = {task: bench.evaluator.expert(task) for task in tasks}
        start = now()
        merged = bench.merge(default_mergers([method])[method], experts)
        weights = merged_weights(bench.base, merged, release=not merged.experts and "search" not in parts)
        row["merge"] = now() - start
        if "search" in parts:
            _warm(bench, "val")
            start = now()
            ScaleChoice(bench, list(tasks), "search", ScaleSearch())(merged)
            row["search"] = now() - start
        if "evaluation" in parts:
            _warm(bench, "test")
            start = now()
            _evaluate(bench, merged, weights)
            row["evaluation"] = now() - start
    return {**row, "peak_bytes": meter.row["peak_MiB"] * MIB}


def _warm(bench: Workbench, split: str) -> None:
    """Measure the experts on a split, which is a cost of its own: its images are decoded."""
    for task in bench.evaluator.data.task_names:
        bench.evaluator.expert_accuracy(task, split)


def _evaluate(bench: Workbench, merged: Merged, weights: Mapping[str, torch.Tensor]) -> None:
    tasks = bench.evaluator.data.task_names
    with bench.evaluator.with_model(weights, merged.routed, tasks) as evaluator:
        for task in tasks:
            evaluator.accuracy(task, "test")


def run(suite: str, method: str, parts: list[str], clock: str) -> Found:
    """:func:`measured` in a process of its own, which remembers nothing of earlier ones."""
    case = json.dumps({"suite": suite, "method": method, "parts": parts, "clock": clock})
    command = [sys.executable, "-m", "benchmarks.planning", "--worker", case]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "MERGEKIT_VISION_CACHE": cache}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    results = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not results:
        raise RuntimeError(f"{method} on {suite}: {done.stderr.strip() or 'no result'}")
    return dict(json.loads(results[-1]))


def compare(suite: str, methods: list[str], parts: list[str], clock: str) -> Iterator[list[Row]]:
    """Rows of one method each: of every part what it took, and the estimate's ratio to that."""
    guesses = estimated(suite, methods, clock, Options().proxies)
    name = Suite.load(suite).name
    seconds = "cpu_seconds" if clock == "cpu" else "seconds"
    for method in methods:
        guess, found = guesses[method], run(suite, method, parts, clock)
        rows = []
        for part in (*parts, "memory"):
            measure, key, unit = ("peak_MiB", "peak_bytes", MIB) if part == "memory" else (seconds, part, 1)
            samples = {measure: [found[key] / unit]}
            if found[key]:
                samples["estimate"] = [guess[key] / found[key]]
            rows.append(Row.of({"suite": name, "method": method, "part": part}, samples))
        yield rows


def main(arguments: list[str] | None = None) -> None:
    """Estimate, measure, print and keep the rows."""
    parser = records.parser("planning", __doc__)
    parser.add_argument("--suites", nargs="*", default=[], help="suite files, or names of built-in suites")
    parser.add_argument("--model", help="open_clip name, such as ViT-B-32: also made-up experts of its shapes")
    parser.add_argument("--layers", type=int, help="only its first blocks")
    parser.add_argument("--tasks", type=int, default=8, help="made-up experts")
    parser.add_argument(
        "--images", type=int, default=16, help="made-up images of each split of a task; proxy images are among them"
    )
    parser.add_argument("--methods", nargs="+", default=list(mergers()))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured; merge always is")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        print(RESULT + json.dumps(measured(**json.loads(options.worker))))
        return
    suites = list(options.suites)
    if options.model:
        suites.append(str(made_up(options.workdir, options.model, options.tasks, options.images, options.layers)))
    recorder = Recorder("planning", options.results)
    for suite in suites:
        for rows in compare(suite, options.methods, options.parts, options.clock):
            recorder.keep(rows)
    print(f"written: {recorder.path}")


if __name__ == "__main__":
    main()
