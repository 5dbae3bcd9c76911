"""All benchmarks, one after the other: figures of README and docs for the demo and ViT-B/32, or as a quick look.

    python -m benchmarks              # make bench: under an hour on two cores
    python -m benchmarks --quick      # make bench-quick: a small encoder and little of everything; under five minutes

Each is a process of its own, and keeps its rows as they come: what an interrupted run has measured stays. At the end stands what
got worse than in the run before, on the same machine. Quick results never replace others: they lie in the working folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import open_clip

from benchmarks import page
from benchmarks.compare import report
from benchmarks.machine import ROOT
from benchmarks.records import RESULTS, WORKDIR, read_all

FULL = (
    "merging --check float32",
    "merging --tasks 4 8 16 --layers 2 --methods ESM TSVM --implementations ours",
    "polar",
    "scaling",
    "routing --models ViT-B-32 --tasks 8 --batches 1 32",
    "evaluation",
    "reading --images 32 --batch 8",
    "planning --suites demo",
    "agreement --suites demo",
    "adapters demo",
)
QUICK = (
    "merging --models {small} --tasks 4 --proxies 8 --methods ESM TIES --check float32",
    "polar --model {small} --tasks 4 --proxies 8 --repeats 1",
    "scaling --model {small} --tasks 4 --proxies 8 --methods ESM --cases 1x1 2x1",
    "routing --models {small} --tasks 8 --batches 8 --seconds 1",
    "evaluation --model {small} --images 32 --seconds 1",
    "reading --model {small} --images 16 --batch 8 --rounds 3",
    "planning --suites demo --methods TSVM --parts merge",
    "agreement --suites demo --methods TSVM --proxies 8 --seeds 0 --images 20",
    "adapters demo --methods ESMPP",
)
ONE_THREAD = frozenset({"routing", "reading", "planning"})
"""Programs of which the CPU time is stated: that of one thread, as threads that wait for each other take it too."""
SMALL = "ViT-S-32-2-blocks"


def small_model(workdir: Path) -> str:
    """Name of a small encoder: the first two blocks of ViT-S/32."""
    config = open_clip.get_model_config("ViT-S-32")
    config["vision_cfg"]["layers"] = 2
    config["text_cfg"]["layers"] = 1
    place = workdir.resolve() / "models" / SMALL
    place.mkdir(parents=True, exist_ok=True)
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return f"local-dir:{place}"


def run(commands: list[list[str]], common: list[str]) -> list[str]:
    """Run some benchmarks, telling how far it is; gives those that failed. An interruption ends it and loses no row."""
    failed: list[str] = []
    start = time.perf_counter()
    for number, (program, *arguments) in enumerate(commands, start=1):
        print(f"\n[{number}/{len(commands)}, {_minutes(start)}] {program} {' '.join(arguments)}", flush=True)
        try:
            command = [sys.executable, "-m", f"benchmarks.{program}", *arguments, *common]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | threads_of(program), check=False)
        except KeyboardInterrupt:
            return [*failed, f"{program} {' '.join(arguments)}, interrupted"]
        if done.returncode:
            failed.append(f"{program} {' '.join(arguments)}")
    print(f"\n{len(commands)} benchmarks in {_minutes(start)}", flush=True)
    return failed


def threads_of(program: str) -> dict[str, str]:
    """What a program's environment says of threads besides the user's own."""
    return {"OMP_NUM_THREADS": "1"} if program in ONE_THREAD else {}


def _minutes(start: float) -> str:
    return "{:.0f}:{:02.0f} min".format(*divmod(time.perf_counter() - start, 60))


def main(arguments: list[str] | None = None) -> int:
    """Measure, compare, refresh the page, and give the exit status: 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small encoder, and little of everything")
    parser.add_argument("--workdir", type=Path, default=ROOT / WORKDIR, help="folder of made-up experts and images")
    parser.add_argument("--only", nargs="+", choices=page.SECTIONS, help="these benchmarks alone")
    options = parser.parse_args(arguments)
    workdir = options.workdir.resolve()
    results = workdir / "quick" if options.quick else RESULTS
    small = small_model(workdir) if options.quick else ""
    commands = [[word.format(small=small) for word in line.split()] for line in (QUICK if options.quick else FULL)]
    before = read_all(results)
    chosen = [words for words in commands if options.only is None or words[0] in options.only]
    failed = run(chosen, ["--workdir", str(workdir), "--results", str(results)])
    report(before, read_all(results))
    if not options.quick:
        page.write()
    for command in failed:
        print(f"failed: {command}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
