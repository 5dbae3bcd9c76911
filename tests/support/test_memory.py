"""How much memory is free."""

from pathlib import Path

import pytest
import torch

from mergekit_vision.support.memory import _GROUPS, _left_by, measured


@pytest.mark.parametrize(("version", "files"), [("", "inactive_file"), ("memory", "total_inactive_file")])
def test_a_groups_limit_leaves_what_is_not_used_and_what_gives_way(tmp_path: Path, version: str, files: str) -> None:
    limit, usage = _GROUPS[version]
    for name, content in {limit: "1000\n", usage: "900\n", "memory.stat": f"anon 5\n{files} 300\nactive_file 7\n"}.items():
        (tmp_path / name).write_text(content)
    assert _left_by(tmp_path, limit, usage) == 400
    (tmp_path / limit).write_text("max\n")
    with pytest.raises(ValueError, match="max"):
        _left_by(tmp_path, limit, usage)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="told by Linux")
def test_what_a_process_takes_is_measured() -> None:
    before = measured(torch.device("cpu"))
    kept = torch.ones(64 << 20, dtype=torch.uint8)
    after = measured(torch.device("cpu"))
    assert before
    assert after
    assert 0.9 * kept.nbytes < after.taken - before.taken < 2 * kept.nbytes
