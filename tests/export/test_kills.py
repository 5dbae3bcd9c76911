"""A merge over an older model, killed, short of disk space, or beside another one: one of the two models is there, whole."""

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
from killing import at_once, files_in, killed_after, killed_at
from small_models import DYNAMIC, STATIC, Save

from mergekit_vision import InputError, load
from mergekit_vision.export.manifest import read_record

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed in a fork")

USERS = {"config.yaml": b"suite: tiny", "results.json": b"{}"}


@pytest.fixture(scope="module")
def models(save: Save, tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[str, bytes]]:
    """Coefficient -> the files of a model that was written in peace."""
    found = {}
    for scale in (DYNAMIC, STATIC):
        place = tmp_path_factory.mktemp("whole")
        save(place, scale)
        found[scale] = files_in(place)
    return found


@pytest.fixture
def directory(save: Save, tmp_path: Path) -> Path:
    """Of a dynamic model, with files of the user's beside it."""
    save(tmp_path / "model", DYNAMIC)
    for name, content in USERS.items():
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


def check(directory: Path, models: dict[float, dict[str, bytes]]) -> float:
    """One of the models is there as it was written, and nothing of the user's is lost; its coefficient."""
    scale: float = read_record(directory)["scale"]
    assert files_in(directory) == models[scale] | USERS
    return scale


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_any_file_operation(save: Save, directory: Path, models: dict[float, dict[str, bytes]], step: int) -> None:
    """Each merge cleans up after the one before, too."""
    found = []
    for number in itertools.count(0, step):
        over = STATIC if check(directory, models) == DYNAMIC else DYNAMIC
        if not killed_at(number, lambda over=over: save(directory, over)):
            break
        found.append(check(directory, models) == over)
    assert set(found) == {False, True}
    assert number > 60
    assert {path.name for path in directory.iterdir()} <= {*models[DYNAMIC], *USERS}
    assert (load(directory).routing is None) == (over == STATIC)


def test_open_clip_reads_what_a_killed_merge_leaves(save: Save, directory: Path, models: dict[float, dict[str, bytes]]) -> None:
    reached = set()
    for number in range(40, 90, 7):
        if killed_at(number, lambda: save(directory, STATIC)):
            model = open_clip.create_model(f"local-dir:{directory}")
            assert (load(directory).visual.proj == model.visual.proj).all()
        reached.add(check(directory, models))
    assert STATIC in reached


@pytest.mark.parametrize("times", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_moment(save: Save, directory: Path, models: dict[float, dict[str, bytes]], times: int) -> None:
    start = time.perf_counter()
    at_once(lambda: save(directory, STATIC))
    whole, moments = time.perf_counter() - start, random.Random(0)
    for _ in range(times):
        over = STATIC if check(directory, models) == DYNAMIC else DYNAMIC
        killed_after(moments.uniform(0, whole), lambda over=over: save(directory, over))
        check(directory, models)
    save(directory, DYNAMIC)
    assert files_in(directory) == models[DYNAMIC] | USERS
    assert {path.name for path in directory.iterdir()} == {*models[DYNAMIC], *USERS}


def test_two_merges_into_one_directory_at_once(save: Save, directory: Path, models: dict[float, dict[str, bytes]]) -> None:
    def often(scale: float) -> None:
        for _ in range(4):
            save(directory, scale)

    at_once(lambda: often(STATIC), lambda: often(DYNAMIC))
    check(directory, models)
    assert {path.name for path in directory.iterdir()} <= {*models[DYNAMIC], *USERS}


def limited(size: int, work: Callable[[], object]) -> None:
    """Work in this process, where no file may grow over a size."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(
        InputError, match=r"`default_root_dir` .*: the model cannot be written \(.*\); it takes 7 MB more"
    ) as caught:
        work()
    assert "what was there before is unchanged" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_a_limit_on_files(save: Save, directory: Path, models: dict[float, dict[str, bytes]], size: int) -> None:
    """A disk that is full is reported in the same way, by another number."""
    before = {path.name for path in directory.iterdir()}
    at_once(lambda: limited(size, lambda: save(directory, STATIC)))
    assert check(directory, models) == DYNAMIC
    assert {path.name for path in directory.iterdir()} == before
    at_once(lambda: limited(size, lambda: save(directory.with_name("new"), STATIC)))
    assert not directory.with_name("new").exists()
