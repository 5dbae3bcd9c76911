"""A merge and an evaluation of the demo in a process of its own, so that even one that is ended by the system is reported."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from mergekit_vision.support.files import CACHE_VARIABLE
from mergekit_vision.support.verdicts import Verdict

_TASKS = "[shapes,signs]"
_EXPECTED, _TOLERANCE = 0.933, 0.03
"""Mean accuracy of the merge, in [0, 1]; devices and versions round otherwise, which moves single images."""
_PATIENCE = 300.0  # seconds
_OTHERS = ("SLURM_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
"""Beginnings of variables under which a process takes itself for one of several."""


def self_check() -> Iterator[Verdict]:
    """Merge two experts of the demo with ESM on the default device and evaluate them, with nothing remembered."""
    with tempfile.TemporaryDirectory(prefix="mergekit-vision-") as place:
        start = time.perf_counter()
        try:
            ended = subprocess.run(_command(place), cwd=place, env=_environment(place), capture_output=True, timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            yield Verdict("fault", "self-check", f"the demo was not merged and evaluated within {_PATIENCE:.0f} s")
            return
        seconds = time.perf_counter() - start
        if ended.returncode:
            yield Verdict("fault", "self-check", _reason(ended))
        else:
            yield _judged(json.loads((Path(place) / "out" / "results.json").read_text()), seconds)


def _command(place: str) -> list[str]:
    options = f"-s demo -m ESM --experts {_TASKS} --tasks {_TASKS} --devices 1 -o".split()
    return [sys.executable, "-m", "mergekit_vision", "test", *options, str(Path(place) / "out")]


def _environment(place: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(_OTHERS)}
    return {**own, CACHE_VARIABLE: str(Path(place) / "cache"), "HF_HUB_OFFLINE": "1"}


def _reason(ended: "subprocess.CompletedProcess[bytes]") -> str:
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return f"the process was ended by {name}; a library does not fit this machine, install it anew"
    lines = ended.stderr.decode(errors="replace").strip().splitlines() or ["it gave no reason"]
    return f"the demo cannot be merged and evaluated: {lines[-1].removeprefix('mergekit-vision: error: '):.500}"


def _judged(results: Mapping[str, dict[str, float]], seconds: float) -> Verdict:
    mean = results["mean"]["accuracy"]
    text = f"two experts of the demo merged and evaluated in {seconds:.1f} s, mean accuracy {100 * mean:.1f} %"
    if abs(mean - _EXPECTED) <= _TOLERANCE:
        return Verdict("ok", "self-check", text)
    wrong = f"{text}, where {100 * _EXPECTED:.1f} % is right; the device or a library computes wrongly"
    return Verdict("fault", "self-check", wrong)
