"""What ``plan`` estimates beside what it takes: time of merging, search and evaluation, and memory.

    python -m benchmarks.planning --suites demo ../shared/zoo/suite.yaml
    python -m benchmarks.planning --workdir DIR --model ViT-B-32 --methods TSVM --parts merge

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.evaluation import suite as made_up
from benchmarks.machine import write
from benchmarks.meter import MIB, Meter
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
SAME = ("suite", "method")
Row = dict[str, Any]


def estimated(suite: str, methods: list[str], clock: str, proxies: int) -> dict[str, Row]:
    """What the plan says of each method."""
    found = Planning(Suite.load(suite), default_mergers(methods), Options(proxies)).content(CLOCKS[clock])
    return dict(found["estimate"]["methods"])


def measured(suite: str, method: str, parts: list[str], clock: str) -> Row:
    """The same of a run, in this process."""
    now, device = CLOCKS[clock], torch.device("cpu")
    row: Row = {}
    with Meter(device) as meter:
        bench = Workbench.open(VisionTasks(suite), Runtime(device))
        tasks = bench.evaluator.data.task_names
        experts = {task: bench.evaluator.expert(task) for task in tasks}
        start = now()
        merged = bench.merge(default_mergers([method])[method], experts)
        weights = merged_weights(bench.base, merged)
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


def run(suite: str, method: str, parts: list[str], clock: str) -> Row:
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


def compare(suite: str, methods: list[str], parts: list[str], clock: str) -> list[Row]:
    """Rows of one suite: of each method what was estimated and measured, and the ratios of the two."""
    guesses = estimated(suite, methods, clock, Options().proxies)
    rows = []
    for method in methods:
        guess, found = guesses[method], run(suite, method, parts, clock)
        row: Row = {"suite": Path(suite).parent.name if Path(suite).suffix else suite, "method": method}
        for part in (*parts, "peak_bytes"):
            row |= {part: round(found[part], 3), f"{part}_estimated": round(guess[part], 3)}
            row[f"{part}_ratio"] = round(guess[part] / found[part], 2) if found[part] else None
        print(row, flush=True)
        rows.append(row)
    return rows


def show(rows: list[Row]) -> None:
    """Print the ratios."""
    keys = [f"{part}_ratio" for part in (*PARTS, "peak_bytes")]
    table = Table("suite", "method", "merge", "search", "evaluation", "memory", title="estimated / measured")
    for row in rows:
        table.add_row(row["suite"], row["method"], *(str(row.get(key, "")) for key in keys))
    Console(width=100).print(table)


def main(arguments: list[str] | None = None) -> None:
    """Estimate, measure, print and write ``benchmarks/results/planning-cpu.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suites", nargs="*", default=[], help="suite files, or names of built-in suites")
    parser.add_argument("--workdir", type=Path, help="folder of made-up experts of --model; kept between runs")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip name; its shapes are used")
    parser.add_argument("--tasks", type=int, default=8, help="made-up experts")
    parser.add_argument("--methods", nargs="+", default=list(mergers()))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured; merge always is")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        print(RESULT + json.dumps(measured(**json.loads(options.worker))))
        return
    suites = [*options.suites, *([str(made_up(options.workdir, options.model, options.tasks, 16))] if options.workdir else [])]
    rows = [row for suite in suites for row in compare(suite, options.methods, options.parts, options.clock)]
    show(rows)
    print(f"written: {write('planning', torch.device('cpu'), rows, SAME)}")


if __name__ == "__main__":
    main()
