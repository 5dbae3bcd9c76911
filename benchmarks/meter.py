"""What a piece of work costs its process: wall time, CPU time, anonymous memory."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

SAMPLE_SECONDS = 0.02
MIB = 2**20


def anonymous_bytes() -> int:
    """Resident pages of this process that no file backs (Linux); pages of mapped checkpoints are not among them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def available_gib() -> float:
    """Memory that new processes can have without swapping (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


class Cost(NamedTuple):
    """Seconds on the wall and of this process's processors; of a moment, or between two."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Cost":
        """This moment."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Cost") -> "Cost":
        """From ``start`` to this moment."""
        return Cost(self.wall - start.wall, self.cpu - start.cpu)


class Stopwatch:
    """Adds up the time of some parts of the work, a device's included; pauses inside a part do not count."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    @contextmanager
    def running(self, sign: int = 1) -> Iterator[None]:
        """Count the time that the context is open."""
        start = self._now()
        yield
        self.seconds += sign * (self._now() - start)

    def paused(self) -> Any:
        """Do not count the time that the context is open, within :meth:`running`."""
        return self.running(-1)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Meter:
    """Measures what happens while the context is open; :attr:`row` then holds the figures.

    The peak is that of the whole process, Python and libraries included; ``idle_MiB`` is what they took at the start.

    Args:
        device: on which the work runs.
        limit_gib: beyond this the process ends itself, before the machine has to choose a victim; ``None`` for no limit.
    """

    def __init__(self, device: torch.device, limit_gib: float | None = None) -> None:
        self.row: dict[str, float] = {}
        self._device, self._limit = device, limit_gib
        self._peak = 0
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Meter":
        if self._device.type == "cuda":
            torch.zeros(1, device=self._device)  # the context of the device is not part of the work
            torch.cuda.reset_peak_memory_stats(self._device)
        self._idle = self._peak = anonymous_bytes()
        self._sampler.start()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._done.set()
        self._sampler.join()
        self.row = {
            "seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "peak_MiB": round(self._peak / MIB, 1),
            "idle_MiB": round(self._idle / MIB, 1),
        }
        if self._device.type == "cuda":
            self.row["device_peak_MiB"] = round(torch.cuda.max_memory_allocated(self._device) / MIB, 1)

    def _sample(self) -> None:
        while True:
            self._peak = max(self._peak, anonymous_bytes())
            if self._limit is not None and self._peak > self._limit * 2**30:
                print(f"needs more than {self._limit:.2f} GiB", file=sys.stderr, flush=True)
                os._exit(1)
            if self._done.wait(SAMPLE_SECONDS):
                return
