"""What a measurement runs on, and where its rows go."""

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.records import Row, Run, keep
from benchmarks.tables import show
from mergekit_vision.support.source_code import versions

ROOT = Path(__file__).parents[1]


class Recorder:
    """Shows and keeps the rows of one benchmark as they come.

    Args:
        benchmark: its name.
        results: folder of the files of results.
        device: on which it runs.

    Attributes:
        path: of the file.
    """

    def __init__(self, benchmark: str, results: Path, device: str = "cpu") -> None:
        self.path = results / f"{benchmark}.json"
        self._here = here(torch.device(device))

    def keep(self, rows: Iterable[Row]) -> None:
        """Take the rows of some cases; the number of threads belongs to a case, and is this process's unless a row says."""
        rows = [replace(row, case={**row.case, "threads": row.case.get("threads", torch.get_num_threads())}) for row in rows]
        keep(self.path, self._here, rows)
        show(rows)


def here(device: torch.device) -> Run:
    """Machine, versions, commit and date of what is measured now; without rows."""
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    return Run(machine, {"python": platform.python_version(), **versions()}, _commit(), f"{datetime.now(timezone.utc):%Y-%m-%d}")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _commit() -> str:
    """Short hash of the checkout, with a ``+`` where files of the code differ from it; empty outside of one."""
    code = ("mergekit_vision", "plugins", "benchmarks", ":!benchmarks/results")
    commit, changed = _git("rev-parse", "--short=7", "HEAD"), _git("status", "--porcelain", "--", *code)
    return f"{commit}+" if commit and changed else commit


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
