"""Tensors that lie in files for a while."""

import gc
import os
import platform
from pathlib import Path

import pytest
import torch

from mergekit_vision.support import scratch
from mergekit_vision.support.scratch import LARGE, joined

PARTS = 4  # which together are twice as large as what is worth a file


ANONYMOUS, MAPPED = ("RssAnon",), ("RssFile", "RssShmem")  # the last where the file system itself is in memory


def resident(kinds: tuple[str, ...]) -> int:
    """Bytes of this process in memory, of pages that no file backs, or that files do."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(kinds))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def parts(bytes_each: int = LARGE // 2) -> list[torch.Tensor]:
    return [torch.full((2, bytes_each // 8), float(number)) for number in range(PARTS)]


@pytest.mark.skipif(platform.system() != "Linux", reason="only there it is known what backs a page")
def test_large_tensors_take_no_memory_that_cannot_be_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given, files = parts(), open_files()
    anonymous, mapped = resident(ANONYMOUS), resident(MAPPED)
    whole = joined(given)
    assert resident(ANONYMOUS) - anonymous < LARGE // 2
    assert resident(MAPPED) - mapped > 1.5 * LARGE
    assert whole.equal(torch.cat(given))
    assert whole.mul_(2)[-1, -1] == 2 * (PARTS - 1), "it can be written to"
    assert not list(tmp_path.iterdir()), "nobody has to remove it"
    assert open_files() == files, "of which a process cannot have many"
    del whole
    gc.collect()
    assert resident(MAPPED) - mapped < LARGE // 2


def full_disk(*_: int) -> None:
    raise OSError(28, "No space left on device")


def cannot(*_: object, **__: object) -> None:
    raise RuntimeError("unable to mmap")


@pytest.mark.parametrize("obstacle", ["full disk", "no map", "no place for files", "another system", "small"])
def test_otherwise_they_are_in_memory(obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if obstacle == "full disk":
        monkeypatch.setattr(scratch.os, "posix_fallocate", full_disk)
    elif obstacle == "no place for files":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    elif obstacle == "another system":
        monkeypatch.delattr(os, "posix_fallocate")
    elif obstacle == "no map":
        monkeypatch.setattr(torch, "from_file", cannot)
    given = parts(64) if obstacle == "small" else parts()
    whole = joined(given)
    assert whole.equal(torch.cat(given))
    assert whole.untyped_storage().filename is None
