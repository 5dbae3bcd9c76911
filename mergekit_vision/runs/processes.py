"""How many processes a run has, checked before Lightning starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mergekit_vision.errors import InputError

_MOST = 1024  # of a machine


def check_devices(devices: list[int] | str | int) -> None:
    """Refuse what names no devices, and more of them than any machine has.

    Raises:
        InputError: for such a value.
    """
    try:
        numbers = _numbers(devices)
    except ValueError:
        numbers = []
    if not numbers or any(not -1 <= number <= _MOST for number in numbers):
        raise InputError(f"`devices` must be a number from 1 to {_MOST}, a list of devices or auto, not {devices}", of="trainer")


@contextmanager
def cpu_devices(devices: list[int] | str | int) -> Iterator[None]:
    """Say in our words what Lightning says when it finds that the devices are the CPU.

    Raises:
        InputError: for a list of devices, and for all of them.
    """
    try:
        yield
    except TypeError as error:
        if "CPUAccelerator" not in str(error):
            raise
        raise InputError(f"`devices` {devices}: the CPU takes a number of processes, from 1", of="trainer") from error


def _numbers(devices: list[int] | str | int) -> list[int]:
    """A number of devices, or their numbers; raises a ``ValueError`` where there is none."""
    if devices == "auto":
        return [-1]
    if isinstance(devices, str):
        return [int(word) for word in devices.strip("[] ").split(",") if word.strip()]
    return devices if isinstance(devices, list) else [devices or -2]


def check_slurm() -> None:
    """Refuse a SLURM job whose variables do not say which process this is: it was not started by ``srun``.

    Raises:
        InputError: with what is missing.
    """
    tasks, job = os.environ.get("SLURM_NTASKS"), os.environ.get("SLURM_JOB_NAME")
    if tasks is None or job in ("bash", "interactive") or torch.distributed.is_torchelastic_launched():
        return  # Lightning does not look at them either
    needed = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", *(["SLURM_NTASKS_PER_NODE"] if tasks != "1" else [])]
    missing = [name for name in needed if not os.environ.get(name, "").isdigit()]
    if missing or not tasks.isdigit():
        raise InputError(
            f"SLURM_NTASKS is {tasks} without numbers in {', '.join(missing) or 'it'}; start the processes with "
            "srun --ntasks-per-node N, or unset SLURM_NTASKS to run one process"
        )


def check_started(processes: int) -> None:
    """Refuse another number of processes than torchrun has started: each would do the whole work, or wait for ever.

    Args:
        processes: of the run, as the trainer has them.

    Raises:
        InputError: with both numbers.
    """
    started = os.environ.get("WORLD_SIZE", "")
    if torch.distributed.is_torchelastic_launched() and started.isdigit() and int(started) != processes:
        raise InputError(
            f"torchrun started {started} processes, but `devices` and `num_nodes` are for {processes}; give the same numbers",
            of="trainer",
        )
