"""Cost of merging, from checkpoints on disk to the merged model on disk, beside a plain implementation of the same formula.

    python -m benchmarks.merging --workdir DIR                          # ViT-B-32, T = 8, all methods
    python -m benchmarks.merging --workdir DIR --methods ESM --check    # and how far from float64 SVDs
    python -m benchmarks.merging --workdir DIR --models ViT-B-32 ViT-B-16 ViT-L-14 --tasks 4 8 16 --layers 2 --draw

Experts of full shape are made once, under ``--workdir``, and read once before every case so that all measure warm files. Each
measurement is a process of its own; its time starts when Python and the libraries are loaded. Memory is the peak of anonymous
resident pages, of the whole process: pages of mapped checkpoints do not count. The textbook side is :mod:`benchmarks.textbook`.
``--layers N`` keeps only the first N transformer blocks of everything: quick, and not the cost of the whole model.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.experts import Files, blocks, label, prepare, tower
from benchmarks.merging_figure import draw
from benchmarks.merging_worker import MERGERS, Case, errors, work
from benchmarks.meter import available_gib

ROOT = Path(__file__).parents[1]
RESULT = "result: "
RATIOS = {"speedup": "seconds", "cpu_ratio": "cpu_seconds", "memory_ratio": "peak_MiB"}  # textbook's over ours
SAME = ("model", "layers", "tasks", "proxies", "method", "implementation")  # a later run's row replaces one with the same
Row = dict[str, Any]


def run(case: Case) -> Row:
    """Measure a case in a process of its own; ``{"failed": reason}`` where it did not survive, for want of memory say."""
    command = [sys.executable, "-m", "benchmarks.merging", "--worker", case.to_json()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    results = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode == 0 and results:
        return dict(json.loads(results[-1]))
    reason = (done.stderr.strip().splitlines() or ["nothing on standard error"])[-1][:200]
    return {"failed": f"{reason} (exit status {done.returncode})"}


def measure(case: Case, repeats: int) -> Row:
    """The fastest of some runs, with the largest peak of all."""
    rows = [run(case) for _ in range(repeats)]
    failed = next((row for row in rows if "failed" in row), None)
    if failed is not None:
        return failed
    return {**min(rows, key=lambda row: row["seconds"]), "peak_MiB": max(row["peak_MiB"] for row in rows)}


def reference(case: Case, double: bool) -> Path | None:
    """Merged model of the textbook, made in a run of its own where no earlier run left one; ``None`` where that fails."""
    exact = replace(case, implementation="textbook", double=double)
    if not exact.output.exists():
        made = run(exact)
        if "failed" in made:
            print(f"no reference: {made['failed']}")
            return None
    return exact.output


def compare(cases: list[Case], repeats: int, check: str | None) -> Iterator[Row]:
    """Rows of one method on one set of experts; the textbook's comes first, where it is wanted, and the other's ratios follow."""
    base: Row = {}
    for case in sorted(cases, key=lambda case: case.implementation, reverse=True):
        row = measure(case, repeats)
        if case.implementation == "textbook":
            base = row
        elif "failed" not in row | base:
            row |= {ratio: round(base[cost] / row[cost], 2) for ratio, cost in RATIOS.items() if base}
        if "failed" not in row:
            exact = reference(case, check == "float64") if check else None
            if exact not in (None, case.output):
                row |= errors(case, exact)
            if case.implementation == "ours" or check != "float32":
                case.output.unlink()
        yield {"method": case.method, "implementation": case.implementation, **row}


def warm(files: Files) -> None:
    """Read all inputs once: the first to run must not pay for the disk alone."""
    for path in (files.base, *files.experts, *files.images):
        with path.open("rb") as stream:
            while stream.read(1 << 24):
                pass


COLUMNS = {
    "method": "method",
    "implementation": "implementation",
    "seconds": "wall s",
    "cpu_seconds": "CPU s",
    "forward_seconds": "of it forward s",
    "peak_MiB": "peak MiB",
    "device_peak_MiB": "device MiB",
    "speedup": "x faster",
    "memory_ratio": "x less memory",
    "error": "error",
    "update_error": "worst update error",
}


def show(title: str, rows: list[Row]) -> None:
    """Print the table of one model and number of tasks."""
    columns = {key: head for key, head in COLUMNS.items() if any(key in row for row in rows)}
    table = Table(*columns.values(), title=title, title_justify="left")
    for row in rows:
        cells = [f"{row[key]:.1e}" if "error" in key and key in row else str(row.get(key, "")) for key in columns]
        table.add_row(*cells[:2], *([f"failed: {row['failed']}"] if "failed" in row else cells[2:]))
    Console(width=160).print(table)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["ViT-B-32"], help="open_clip names; their vision towers' shapes are used")
    parser.add_argument("--tasks", nargs="+", type=int, default=[8])
    parser.add_argument("--methods", nargs="+", choices=MERGERS, default=list(MERGERS))
    parser.add_argument("--implementations", nargs="+", choices=("ours", "textbook"), default=["ours", "textbook"])
    parser.add_argument("--proxies", type=int, default=32, help="images a task, for ESM")
    parser.add_argument("--layers", type=int, help="keep only the first blocks of every tower; the table says so")
    parser.add_argument("--workdir", type=Path, help="folder of the made-up experts; they are made once")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the fastest counts")
    parser.add_argument(
        "--check", nargs="?", const="float64", choices=("float32", "float64"), help="compare weights with the textbook's; kept"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float, default=0.9 * available_gib(), help="GiB a run may take; it gives up beyond")
    parser.add_argument("--draw", action="store_true", help="draw cost against T and width")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.workdir is None and options.worker is None:
        parser.error("--workdir is required")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write ``benchmarks/results/merging-DEVICE.json``."""
    options = parse(arguments)
    if options.worker is not None:
        print(RESULT + json.dumps(work(options.worker)))
        return
    rows: list[Row] = []
    for model in options.models:
        for tasks in options.tasks:
            rows += measured(model, tasks, options)
    device = torch.device(options.device)
    written = machine.write("merging", device, rows, SAME)
    print(f"written: {written}")
    if options.draw and any("seconds" in row for row in rows):
        alike = {(row["layers"], row["of_layers"], row["proxies"]) for row in rows}
        known = json.loads(written.read_text())["rows"]
        chosen = [row for row in known if (row["layers"], row["of_layers"], row["proxies"]) in alike]
        print(f"drawn: {draw(chosen, written.with_suffix('.png'))}")


def measured(model: str, tasks: int, options: argparse.Namespace) -> list[Row]:
    """Prepare, measure and print the table of one model and number of tasks."""
    whole = tower(model)
    depth = min(options.layers or blocks(whole), blocks(whole))
    files = prepare(options.workdir.resolve(), model, depth, tasks, options.proxies)
    warm(files)
    case = {"model": label(model), "width": whole.conv1.out_channels, "layers": depth, "of_layers": blocks(whole)}
    case |= {"tasks": tasks, "proxies": options.proxies}
    rows: list[Row] = []
    for method in options.methods:
        fields = {"model": model, "layers": depth, "method": method, "device": options.device, "limit_gib": options.limit}
        cases = [Case.of(files, implementation=implementation, **fields) for implementation in options.implementations]
        rows += [{**case, **row} for row in compare(cases, options.repeats, options.check)]
    part = f", CUT TO {depth} of {blocks(whole)} blocks" if depth < blocks(whole) else ""
    show(f"{label(model)}, T = {tasks}, {options.proxies} proxies a task, {options.device}{part}", rows)
    return rows


if __name__ == "__main__":
    main()
