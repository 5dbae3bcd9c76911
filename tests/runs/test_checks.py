"""What is refused before any long work starts."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mergekit_vision import InputError, MergedCLIP, Trainer, VisionTasks
from mergekit_vision.data.checks import Needs
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.runs.checks import check_alike, check_merged, check_place, check_processes
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.team import Team


def test_a_directory_that_can_be_made_is_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_place(tmp_path)
    check_place(tmp_path / "deep" / "down")
    monkeypatch.chdir(tmp_path)
    check_place(Path("relative"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(
            InputError, match=rf"^`default_root_dir` {place}: {tmp_path}/file is a file; name a directory$"
        ) as caught:
            check_place(place)
        assert caught.value.of == "trainer"
        with pytest.raises(InputError, match="is a file"):
            Trainer(default_root_dir=str(place))


def test_links_that_lead_nowhere_and_impossible_names(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("nowhere", "loop"):
        for place in (tmp_path / name, tmp_path / name / "deep"):
            with pytest.raises(InputError, match=rf"^`default_root_dir` {place}: {tmp_path}/{name} is a link that leads nowhere"):
                check_place(place)
    for name in ("n" * 300, "nul\0"):
        with pytest.raises(InputError, match=r"^`default_root_dir` .*: cannot be used \(.*\); name another directory$"):
            check_place(tmp_path / name)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    check_place(tmp_path / "link" / "deep")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may write anywhere")
def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot be written to; name another directory"):
        check_place(tmp_path / "locked" / "deep")


def test_more_processes_than_images() -> None:
    check_processes(2, 2)
    with pytest.raises(InputError, match="`devices`: 3 processes for 2 images; take fewer") as caught:
        check_processes(3, 2)
    assert caught.value.of == "trainer"


def test_a_merged_model_belongs_to_its_suite(tiny_suite: Path, tmp_path: Path) -> None:
    suite = Suite.load(tiny_suite)
    with pytest.raises(InputError, match="not a merged model"):
        check_merged(tmp_path, suite)
    Trainer(default_root_dir=str(tmp_path), accelerator="cpu").merge(MergedCLIP(TaskArithmetic()), VisionTasks(str(tiny_suite)))
    check_merged(tmp_path, suite)
    config = tmp_path / "open_clip_config.json"
    before = config.read_text()
    for old, new in (('"quick_gelu": false', '"quick_gelu": true'), ('"head_width": 16', '"head_width": 8'), ("0.48", "0.49")):
        config.write_text(before.replace(old, new))
        with pytest.raises(InputError, match=r"open_clip_config\.json (was changed|has)"):
            check_merged(tmp_path, suite)
        with pytest.raises(InputError, match="merged from another backbone"):
            check_merged(tmp_path, suite, verify=False)
    config.write_text(before)
    with pytest.raises(InputError, match=r"merged from another backbone than that of .*suite\.yaml \(local-dir:"):
        check_merged(tmp_path, Suite.load("demo"))


def seen_by(root: Path, rank: int, others: list[dict[str, str]]) -> dict[str, str]:
    """What a process finds, which hears of the other ones what is given."""
    told: list[Any] = []

    def broadcast(value: Any, source: int) -> Any:
        if source == rank:
            assert value is not None
            told.append(value)
            return value
        if others:
            return {key.replace("ROOT", str(root)): text for key, text in others[source].items()}
        return told[-1] if len(told) > 1 else "another machine"

    needs = Needs(frozenset({"test"}), frozenset({"val"}))
    check_alike(VisionTasks(str(root / "suite.yaml")), needs, Team(rank, 2, broadcast))
    return {key.replace(str(root), "ROOT"): text for key, text in told[-1].items()}


def test_processes_that_see_other_files_or_packages_are_refused(root: Path) -> None:
    first = seen_by(root, 0, [])
    assert seen_by(root, 1, [first]) == first
    assert {"torch", "ROOT/suite.yaml", "ROOT/experts/colors.safetensors", "tasks.grays.data.val"} <= first.keys()
    for what in ("torch", "mergekit_vision's code", "ROOT/experts/grays.pt", "tasks.grays.data.test"):
        with pytest.raises(InputError, match=r"process 1 of 2 sees another version than process 0 of: ") as caught:
            seen_by(root, 1, [{**first, what: "another"}])
        assert f"of: {what.replace('ROOT', str(root))};" in str(caught.value)


def test_processes_that_read_the_same_files_hash_no_expert(root: Path) -> None:
    told: list[Any] = []

    def broadcast(value: Any, source: int) -> Any:
        told.extend([value] if source == 0 else [])
        return told[-1]

    needs = Needs(frozenset({"test"}), frozenset({"val"}))
    check_alike(VisionTasks(str(root / "suite.yaml")), needs, Team(0, 2, broadcast))
    place, seen = told
    assert "colors.safetensors" in place
    assert {"torch", str(root / "suite.yaml"), "tasks.grays.data.val"} <= seen.keys()
    assert not {"mergekit_vision's code", str(root / "experts" / "colors.safetensors")} & seen.keys()
    os.utime(root / "experts" / "colors.safetensors", ns=(0, 0))
    check_alike(VisionTasks(str(root / "suite.yaml")), needs, Team(0, 2, broadcast))
    assert told[2] != place, "another time stamp is another file"


def test_another_expert_is_another_version(root: Path) -> None:
    first = seen_by(root, 0, [])
    shutil.copy(root / "experts" / "stripes.safetensors", root / "experts" / "colors.safetensors")
    with pytest.raises(InputError, match=r"sees another version than process 0 of: .*/experts/colors\.safetensors; give all"):
        seen_by(root, 1, [first])
