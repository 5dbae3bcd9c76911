"""Memory that runs out, in one line."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.errors import InputError
from mergekit_vision.merging.record import needs_images
from mergekit_vision.runs.comparison import Comparison
from mergekit_vision.runs.module import MergedCLIP
from mergekit_vision.runs.revision import Revision
from mergekit_vision.runs.tuning import Tuning
from mergekit_vision.support.memory import Memory, is_spent, measured, readable_size, wanted

_SMALLER = "merge fewer experts, take fewer proxy images or a smaller batch, or free memory"

_TELLING = 0.9  # a larger share says nothing: what was asked for last was a small part of the whole


class Setting(NamedTuple):
    """A number that memory grows with.

    Attributes:
        argument: what sets it.
        now: its value.
        unit: what it counts.
    """

    argument: str
    now: int
    unit: str


def settings_of(model: MergedCLIP | Comparison | Tuning | Revision, data: VisionTasks) -> Iterator[Setting]:
    """What the memory of a model's next step can grow with: of merging first, where it is not merged yet."""
    if not isinstance(model, Revision):
        yield from _of_merging(model, data)
    yield Setting("data.batch_size", data.batch_size, "images a batch")


def _of_merging(model: MergedCLIP | Comparison | Tuning, data: VisionTasks) -> Iterator[Setting]:
    if isinstance(model, Comparison | Tuning):
        mergers = [row.merger for row in model.rows]
    else:
        mergers = [model.merger] if model.merger is not None and model.encoder is None else []
    if mergers:
        yield Setting("model.experts", len(model.recipe.experts or data.suite.tasks), "experts")
    if any(map(needs_images, mergers)):
        yield Setting("data.proxies.n", data.proxies.n, "proxy images")


@contextmanager
def explained_memory(
    work: str, device: torch.device, settings: Callable[[], Iterable[Setting]] = tuple, processes: int = 1
) -> Iterator[None]:
    """Say what memory was missing for some work, and what would fit.

    Args:
        work: what is done, such as "merging".
        device: on which.
        settings: tells, once memory has run out, what the work's memory can have grown with.
        processes: how many of the run share the device.

    Raises:
        InputError: when Python, the CPU's allocator or an accelerator's has no memory left.
    """
    before = measured(device)
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_spent(error):
            raise
        size, now = wanted(error), measured(device, error)
        if size and now and size <= now.free:  # much of it was freed before we could look
            now = None
        said = [f"{work} ran out of memory on {device}{_needed(size, now)}"]
        if size and now and before and (fitting := _fitting(list(settings()), before, now, size, processes)):
            said.append(f"changed alone, at most {fitting} would fit")
        said.append(_SMALLER if device.type == "cpu" else f"use the CPU (`trainer.accelerator` cpu), or {_SMALLER}")
        raise InputError("; ".join(said), of="command") from error


def _needed(size: int | None, now: Memory | None) -> str:
    parts = [f"{readable_size(size)} more were needed at once"] if size else []
    if now:
        parts.append(f"{readable_size(now.taken)} were taken by this process and {readable_size(now.free)} free")
    return f" ({', '.join(parts)})" if parts else ""


def _fitting(settings: list[Setting], before: Memory, now: Memory, size: int, processes: int) -> str:
    """How large each setting may be at most.

    The work needs no less than what it had taken and asked for. If that is a constant and something in proportion to a setting,
    the room is enough for the same share of the setting at most.
    """
    grown, room = now.taken + size - before.taken, now.taken + now.free - before.taken
    known = 0 < room <= _TELLING * grown
    fitting = [(setting, int(setting.now * room / grown)) for setting in settings if known]
    if processes > 1:
        setting = Setting("trainer.devices", processes, "processes")
        fitting.append((setting, int((now.free + processes * now.taken) / (now.taken + size))))
    texts = [f"{most} of {of.now} {of.unit} (`{of.argument}`)" for of, most in fitting if 1 <= most < of.now]
    return " or ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))
