"""Time of ``merge`` by number of threads and of processes, on gloo, which share the work.

    python -m benchmarks.scaling                      # ViT-B-32, T = 8, ESM and TSVM
    python -m benchmarks.scaling --methods ESM --cases 1x1 2x1

A case is PROCESSESxTHREADS, the threads being those of each process. What is measured is the command: checks of the suite,
merging, and the merged model on disk, from when Python and the libraries are loaded to the end of the last process. Seconds and
memory are those of the slowest and the largest process. ``speedup`` is that over one process of one thread. On a machine that is
busy with other things the one by CPU time tells more, where processes have one thread: what the slowest process computes is what
the others wait for.

The row of sixteen threads is not measured but follows from one and two by Amdahl's law.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import records
from benchmarks.evaluation import suite as made_up
from benchmarks.experts import label
from benchmarks.machine import ROOT, Recorder
from benchmarks.meter import Meter
from benchmarks.records import Row
from mergekit_vision import MergedCLIP, Trainer, VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.registry import get

MODELED = 16
Cost = dict[str, float]


def merge(suite: str, method: str, proxies: int, processes: int, output: Path) -> None:
    """Merge as one of the processes, and leave what it cost in the output directory."""
    with Meter(torch.device("cpu")) as meter:
        trainer = Trainer(default_root_dir=str(output), accelerator="cpu", devices=processes)
        trainer.merge(MergedCLIP(get(method)()), VisionTasks(suite, proxies=Proxies(n=proxies)))
    rank = os.environ.get("RANK", "0")
    (output.parent / f"cost-{rank}.json").write_text(json.dumps(meter.row))


def run(suite: Path, method: str, proxies: int, processes: int, threads: int) -> Cost:
    """The cost of the slowest process of a run, which remembers nothing of earlier ones."""
    with TemporaryDirectory() as place:
        case = {"suite": str(suite), "method": method, "proxies": proxies, "processes": processes}
        command = ["-m", "benchmarks.scaling", "--worker", json.dumps({**case, "output": f"{place}/merged"})]
        if processes > 1:
            command = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", _port(), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MERGEKIT_VISION_CACHE": f"{place}/cache"}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{method}, {processes} processes: {done.stderr[-2000:]}")
        found = [json.loads(path.read_text()) for path in Path(place).glob("cost-*.json")]
    if len(found) != processes:
        raise RuntimeError(f"{len(found)} of {processes} processes have told what they cost")
    return {name: max(cost[name] for cost in found) for name in ("seconds", "cpu_seconds", "peak_MiB")}


def _port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def amdahl(one: float, two: float, workers: int) -> float:
    """Time with so many workers, from that with one and two: a part is divided among them, the rest is not.

    >>> amdahl(10.0, 6.0, 4)
    4.0
    """
    divided = min(one, max(0.0, 2 * (one - two)))
    return one - divided + divided / workers


def rows(runs: dict[tuple[int, int], list[Cost]], about: records.Case) -> list[Row]:
    """Rows of the cases ``(processes, threads)`` of one method, and that of the model."""
    single = runs.get((1, 1), [])
    found = []
    for (processes, threads), costs in runs.items():
        samples = {name: [cost[name] for cost in costs] for name in costs[0]}
        if single:
            turns = list(zip(single, costs, strict=True))
            samples["speedup"] = [one["seconds"] / cost["seconds"] for one, cost in turns]
            if threads == 1:
                samples["cpu_speedup"] = [one["cpu_seconds"] / cost["cpu_seconds"] for one, cost in turns]
        found.append(Row.of({**about, "processes": processes, "threads": threads, "source": "measured"}, samples))
    if single and (twice := runs.get((1, 2))):
        times = [amdahl(one["seconds"], two["seconds"], MODELED) for one, two in zip(single, twice, strict=True)]
        modeled = {"seconds": times, "speedup": [one["seconds"] / time for one, time in zip(single, times, strict=True)]}
        found.append(Row.of({**about, "processes": 1, "threads": MODELED, "source": "Amdahl's law"}, modeled))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep the rows."""
    parser = records.parser("scaling", __doc__)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip name; its shapes are used")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=["ESM", "TSVM"])
    parser.add_argument("--proxies", type=int, default=32, help="images a task")
    parser.add_argument("--cases", nargs="+", default=["1x1", "1x2", "2x1"], help="PROCESSESxTHREADS")
    parser.add_argument("--repeats", type=int, default=1, help="rounds, in which the cases take turns")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        case = json.loads(options.worker)
        merge(**{**case, "output": Path(case["output"])})
        return
    suite = made_up(options.workdir.resolve(), options.model, options.tasks, options.proxies)
    recorder = Recorder("scaling", options.results)
    cases = [(int(processes), int(threads)) for processes, threads in (case.split("x") for case in options.cases)]
    for method in options.methods:
        runs: dict[tuple[int, int], list[Cost]] = {case: [] for case in cases}
        for _ in range(options.repeats):
            for processes, threads in cases:
                runs[processes, threads].append(run(suite, method, options.proxies, processes, threads))
        about: records.Case = {"model": label(options.model), "tasks": options.tasks, "proxies": options.proxies}
        recorder.keep(rows(runs, {**about, "method": method}))
    print(f"written: {recorder.path}")


if __name__ == "__main__":
    main()
