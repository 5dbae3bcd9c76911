"""Freed memory goes back to the system."""

import platform
import subprocess
import sys

import pytest

FREED = """
from pathlib import Path
import torch
from mergekit_vision.support.allocator import release_freed_memory

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

del (large := [torch.ones(16 << 18)])[:]  # once one was freed, blocks of this size are kept
blocks = [torch.ones(4 << 18) for _ in range(60)]
wall = torch.ones(1 << 18)  # behind the last: what is at the very end is given back anyway
full = resident()
del blocks
kept = resident()
release_freed_memory()
print(full - kept, full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such pool")
def test_freed_blocks_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, timeout=120, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 100 < 200 < after  # MiB, of 240
