"""What a measurement ran on, and its JSON file."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, device, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def write(name: str, device: torch.device, rows: list[dict[str, Any]], keys: tuple[str, ...] = ()) -> Path:
    """Write rows with the machine they were measured on; gives the file.

    With ``keys``, rows of an earlier run on the same machine and versions stay, where no new row has the same values of the keys.
    """
    RESULTS.mkdir(exist_ok=True)
    path, here = RESULTS / f"{name}-{device.type}.json", machine(device)
    if keys and path.exists():
        before = json.loads(path.read_text())
        fresh = {tuple(row[key] for key in keys) for row in rows}
        if before["machine"] == here:
            rows = [row for row in before["rows"] if tuple(row[key] for key in keys) not in fresh] + rows
    path.write_text(json.dumps({"machine": here, "rows": rows}, indent=1) + "\n")
    return path
