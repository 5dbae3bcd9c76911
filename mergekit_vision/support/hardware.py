"""Whether torch works on this machine, and what the machine has."""

import os
import shutil
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_vision.support.memory import main_memory
from mergekit_vision.support.paths import nearest
from mergekit_vision.support.verdicts import Verdict

if TYPE_CHECKING:
    import torch

_GB = 1e9
_LITTLE_MEMORY, _LITTLE_DISK = 4 * _GB, 5 * _GB
"""Bytes below which a warning is given: twenty experts of ViT-L/14 are merged in 3 GB, and a large data set takes 5 and more."""


def torchvision_verdicts() -> Iterator[Verdict]:
    """Whether torchvision was built for this torch: its compiled operators are called."""
    import torch

    theirs = _minor(torch.__version__) + 15  # 2.4 goes with 0.19, and so on
    remedy = f"pip install 'torchvision==0.{theirs}.*', from where torch was installed"
    try:
        import torchvision

        kept = torch.ops.torchvision.nms(torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([1.0, 0.5]), 0.5)
    except Exception as error:  # of missing operators and of libraries that cannot be loaded
        reason = " ".join(str(error).split())
        yield Verdict("fault", "torchvision", f"does not go with torch {torch.__version__} ({reason:.200}); {remedy}")
        return
    pair = f"torchvision {torchvision.__version__} with torch {torch.__version__}"
    if kept.tolist() != [0]:
        yield Verdict("fault", "torchvision", f"{pair} computes wrongly; {remedy}")
    elif _minor(torchvision.__version__) != theirs:
        yield Verdict("warning", "torchvision", f"{pair} is no pair that was released together; {remedy}")
    else:
        yield Verdict("ok", "torchvision", pair)


def _minor(version: str) -> int:
    return int(version.split(".")[1])


def device_verdicts() -> Iterator[Verdict]:
    """Every device, and whether it computes in float64 as merging does."""
    import torch

    yield _float64(torch.device("cpu"), "")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield _float64(torch.device("cuda", index), f"{about.name}, {about.total_memory / _GB:.0f} GB, ")
    if torch.backends.mps.is_available():
        yield Verdict("ok", "mps", "evaluates; it has no float64, so merging is done on the CPU")
    if not torch.cuda.is_available() and Path("/dev/nvidia0").exists():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Verdict(
            "warning", "cuda", f"a GPU of NVIDIA's is there, but {built} and cannot use it; install driver and torch anew"
        )


def _float64(device: "torch.device", about: str) -> Verdict:
    import torch

    matrix = torch.arange(64, dtype=torch.float64).reshape(8, 8) / 64
    gram = (matrix @ matrix.T + torch.eye(8, dtype=torch.float64)).to(device)
    values, vectors = torch.linalg.eigh(gram)
    error = float((vectors * values @ vectors.T - gram).abs().max())
    if error > 1e-12:
        return Verdict(
            "fault", str(device), f"{about}float64 is wrong by {error:.1e}; merge on the CPU (--trainer.accelerator cpu)"
        )
    return Verdict("ok", str(device), f"{about}float64 works")


def process_verdicts() -> Iterator[Verdict]:
    """What several processes of a run talk by: gloo, and NCCL among GPUs."""
    from torch import distributed

    if not distributed.is_available():
        yield Verdict("warning", "processes", "torch is built without torch.distributed; runs have one process")
        return
    if distributed.is_gloo_available() and not distributed.is_initialized():
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=10))
        distributed.destroy_process_group()
    yield from _backends(distributed.is_gloo_available(), distributed.is_nccl_available())


def _backends(gloo: bool, nccl: bool) -> Iterator[Verdict]:
    import torch

    there = [name for name, is_there in (("gloo", gloo), ("NCCL", nccl)) if is_there]
    needed = "NCCL" if torch.cuda.device_count() > 1 else "gloo"
    if needed in there:
        yield Verdict("ok", "processes", f"{' and '.join(there)} for several processes")
    else:
        yield Verdict("warning", "processes", f"torch is built without {needed}; runs on several devices are not possible")


def thread_verdicts() -> Iterator[Verdict]:
    """Threads of torch against cores that this process may use."""
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    counted = f"{threads} {'thread' if threads == 1 else 'threads'} of torch on {cores} {'core' if cores == 1 else 'cores'}"
    if threads > cores:
        yield Verdict("warning", "threads", f"{counted}, which slows all of them down; set OMP_NUM_THREADS={cores}")
    elif threads == 1 < cores:
        variable = "; OMP_NUM_THREADS is set" if os.environ.get("OMP_NUM_THREADS") else ""
        yield Verdict("warning", "threads", f"{counted}{variable}; merging is faster with all of them")
    else:
        yield Verdict("ok", "threads", counted)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_verdicts() -> Iterator[Verdict]:
    """Memory that is free, within the limits of a container too, where the system tells it."""
    memory = main_memory()
    if memory is None:
        yield Verdict("ok", "memory", "how much is free is not known on this system")
    elif memory.free < _LITTLE_MEMORY:
        yield Verdict(
            "warning",
            "memory",
            f"{memory.free / _GB:.1f} GB free; merging takes 1 to 3 GB, and decoded images as many as `--data.cache_mb` allows",
        )
    else:
        yield Verdict("ok", "memory", f"{memory.free / _GB:.1f} GB free")


def disk_verdicts(places: Iterable[Path]) -> Iterator[Verdict]:
    """Space on the disks of some directories, which need not be there yet; one line for each disk."""
    seen = set()
    for place in places:
        above = nearest(place)
        if above.stat().st_dev in seen:
            continue
        seen.add(above.stat().st_dev)
        free = shutil.disk_usage(above).free
        text = f"{free / _GB:.1f} GB free at {above}"
        yield Verdict("ok" if free >= _LITTLE_DISK else "warning", "disk", text)
