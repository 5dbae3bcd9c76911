"""Cost of merging, from checkpoints on disk to the merged model on disk, beside a plain implementation of the same formula.

    python -m benchmarks.merging                              # ViT-B-32, T = 8, all methods
    python -m benchmarks.merging --methods ESM --check        # and how far from float64 SVDs
    python -m benchmarks.merging --models ViT-B-32 ViT-L-14 --tasks 4 8 16 --layers 2

Experts of full shape are made once, under ``--workdir``, and read once before every case so that all measure warm files. Each
measurement is a process of its own; its time starts when Python and the libraries are loaded. Memory is the peak of anonymous
resident pages, of the whole process: pages of mapped checkpoints do not count. The textbook side is :mod:`benchmarks.textbook`.
``--layers N`` keeps only the first N transformer blocks of everything: quick, and not the cost of the whole model.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks import records
from benchmarks.experts import Files, blocks, label, prepare, tower
from benchmarks.machine import Recorder
from benchmarks.merging_worker import METHODS, Case, errors, work
from benchmarks.meter import available_gib
from benchmarks.records import Row

ROOT = Path(__file__).parents[1]
RESULT = "result: "
RATIOS = {"speedup": "seconds", "cpu_speedup": "cpu_seconds", "memory_saving": "peak_MiB"}  # textbook's over ours


class FailedError(Exception):
    """A run did not survive, for want of memory say."""


def run(case: Case) -> dict[str, float]:
    """Measure a case in a process of its own.

    Raises:
        FailedError: with the last that it said.
    """
    command = [sys.executable, "-m", "benchmarks.merging", "--worker", case.to_json()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    results = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode == 0 and results:
        return dict(json.loads(results[-1]))
    reason = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1][:200]
    raise FailedError(f"{reason} (exit status {done.returncode})")


def reference(case: Case, double: bool) -> Path | None:
    """Merged model of the textbook, made in a run of its own where no earlier run left one; ``None`` where that fails."""
    exact = replace(case, implementation="textbook", double=double)
    if not exact.output.exists():
        try:
            run(exact)
        except FailedError as error:
            print(f"no reference: {error}")
            return None
    return exact.output


def compare(cases: list[Case], about: records.Case, repeats: int, check: str | None) -> Iterator[Row]:
    """Rows of one method on one set of experts; the textbook's comes first, where it is wanted, and the other's ratios follow."""
    base: Mapping[str, float] = {}
    for case in sorted(cases, key=lambda case: case.implementation, reverse=True):
        what = {**about, "method": case.method, "implementation": case.implementation}
        try:
            runs = [run(case) for _ in range(repeats)]
        except FailedError as error:
            yield Row(what, failed=str(error))
            continue
        samples = {name: [one[name] for one in runs] for name in runs[0] if name in records.MEASURES}
        if base:
            samples |= {ratio: [base[cost] / one[cost] for one in runs] for ratio, cost in RATIOS.items()}
        exact = reference(case, check == "float64") if check else None
        if exact is not None and exact != case.output:
            samples |= {name: [error] for name, error in errors(case, exact).items()}
        if case.implementation == "ours" or check != "float32":
            case.output.unlink()
        row = Row.of(what, samples)
        if case.implementation == "textbook":
            base = row.values
        yield row


def warm(files: Files) -> None:
    """Read all inputs once: the first to run must not pay for the disk alone."""
    for path in (files.base, *files.experts, *files.images):
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = records.parser("merging", __doc__)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"], help="open_clip names; their vision towers' shapes are used")
    parser.add_argument("--tasks", nargs="+", type=int, default=[8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--implementations", nargs="+", choices=("ours", "textbook"), default=["ours", "textbook"])
    parser.add_argument("--proxies", type=int, default=32, help="images a task, for ESM")
    parser.add_argument("--layers", type=int, help="keep only the first blocks of every tower; the table says so")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each")
    parser.add_argument(
        "--check", nargs="?", const="float64", choices=("float32", "float64"), help="compare weights with the textbook's; kept"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=0.9 * available_gib(), help="GiB a run may take; it gives up beyond")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep the rows."""
    options = parse(arguments)
    if options.worker is not None:
        print(RESULT + json.dumps(work(options.worker)))
        return
    recorder = Recorder("merging", options.results, options.device)
    for model in options.models:
        for tasks in options.tasks:
            measure(model, tasks, options, recorder)
    print(f"written: {recorder.path}")


def measure(model: str, tasks: int, options: argparse.Namespace, recorder: Recorder) -> None:
    """Prepare and measure one model and number of tasks."""
    whole = tower(model)
    depth = min(options.layers or blocks(whole), blocks(whole))
    files = prepare(options.workdir.resolve(), model, depth, tasks, options.proxies)
    warm(files)
    about: records.Case = {"model": label(model), "layers": f"{depth} of {blocks(whole)}"}
    about |= {"tasks": tasks, "proxies": options.proxies}
    for method in options.methods:
        cases = [
            Case.of(
                files,
                model=model,
                layers=depth,
                method=method,
                implementation=implementation,
                device=options.device,
                limit_gib=options.limit,
            )
            for implementation in options.implementations
        ]
        recorder.keep(compare(cases, about, options.repeats, options.check))


if __name__ == "__main__":
    main()
