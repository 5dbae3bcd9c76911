"""Memory: errors that say that there is none left, and how much of it is taken and free."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_SPENT = re.compile(r"out of memory|(can't|cannot) allocate memory|not enough memory|failed to allocate", re.IGNORECASE)
_SIZE = r"(\d+(?:\.\d+)? ?(?:bytes|[kmgt]ib))"
_WANTED = re.compile(rf"(?:tried|unable) to allocate {_SIZE}", re.IGNORECASE)
_OF_CUDA = re.compile(rf"(?is)of which {_SIZE} is free.*?{_SIZE} is allocated by PyTorch,.*? {_SIZE} is reserved")
_UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_GROUPS = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Controller in ``/proc/self/cgroup``, of version 2 and of version 1 -> the files of a group's limit and of what it uses."""


class Memory(NamedTuple):
    """Of a device, in bytes.

    Attributes:
        taken: by this process.
        free: what it could have besides.
    """

    taken: int
    free: int


def is_spent(error: Exception) -> bool:
    """Whether an error of Python, of the system or of one of torch's allocators says so.

    >>> is_spent(MemoryError()), is_spent(RuntimeError("shapes do not fit"))
    (True, False)
    """
    return isinstance(error, MemoryError) or bool(_SPENT.search(str(error)))


def wanted(error: Exception) -> int | None:
    """How many bytes could not be allocated, where the error says it.

    >>> wanted(RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")) / 2**30
    2.5
    """
    found = _WANTED.search(str(error))
    return _bytes(found[1]) if found else None


def measured(device: "torch.device", error: Exception | None = None) -> Memory | None:
    """The memory of a device, now or when an error was raised; ``None`` where that cannot be told.

    CUDA's own error has its numbers: when it is caught, much is free again.
    """
    if device.type == "cuda":
        return _of_cuda(device, error)
    return main_memory() if device.type == "cpu" else None


def main_memory() -> Memory | None:
    """Main memory, where the system is Linux: resident, and free within the limits of the machine, its groups and the process."""
    try:
        pages = [int(number) for number in Path("/proc/self/statm").read_text().split()]
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        own = Path("/proc/self/cgroup")
        groups = own.read_text() if own.is_file() else ""  # of a kernel without them
    except OSError:
        return None
    import resource

    whole, resident, size = pages[0], pages[1], resource.getpagesize()
    left = [int(found[1]) << 10] if found else []
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        left.append(limit - whole * size)
    return Memory(resident * size, max(0, min([*left, *_left_by_groups(groups)]))) if left else None


def readable_size(size: int) -> str:
    """A number of bytes for people.

    >>> readable_size(3 << 29), readable_size(20 << 20)
    ('1.5 GiB', '20 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+) ?(\w+)", text.lower()).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit])


def _of_cuda(device: "torch.device", error: Exception | None) -> Memory | None:
    if error is not None:
        found = _OF_CUDA.search(str(error))
        free, taken, reserved = map(_bytes, found.groups()) if found else (0, 0, 0)
        return Memory(taken, free + reserved) if found else None
    import torch

    return Memory(torch.cuda.memory_allocated(device), 0)  # 0 where CUDA has not started yet


def _left_by_groups(groups: str) -> Iterator[int]:
    """What the limits of a process's control groups, and of those around them, leave it."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in _GROUPS:
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                with suppress(OSError, ValueError):  # not visible here, or no limit
                    yield _left_by(Path("/sys/fs/cgroup", controllers, str(group).lstrip("/")), *_GROUPS[controllers])


def _left_by(folder: Path, limit: str, usage: str) -> int:
    """What a group's limit leaves; files that were read count as used, but give way."""
    files = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), flags=re.MULTILINE)
    used = int((folder / usage).read_text()) - (int(files[1]) if files else 0)
    return int((folder / limit).read_text()) - used
