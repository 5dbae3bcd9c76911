"""Which images are proxies, and what they look like to a merger."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import process, whole_split
from pictures import row_groups_read
from tiny import TASKS, picture

from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.errors import EvaluationError, InputError
from mergekit_vision.sources.parquet import ParquetImages


@pytest.mark.parametrize("label", [None, 1])
def test_proxies_are_the_documented_draw(tiny_suite: Path, label: int | None) -> None:
    images, labels = whole_split(tiny_suite, "colors", "val")
    pool = images if label is None else images[labels == label]
    chosen = np.random.RandomState(5).choice(len(pool), 6, replace=False)
    data = VisionTasks(str(tiny_suite), batch_size=4, proxies=Proxies(n=6, seed=5, label=label))
    for _ in range(2):
        batches = list(data.proxy_loader("colors"))
        assert [len(batch) for batch in batches] == [4, 2]
        assert torch.equal(torch.cat(batches), pool[np.sort(chosen)])


def test_halves_share_the_draw() -> None:
    """Two draws without a common image, of what there is where the split has fewer images than are wanted."""
    source: Any = range(37)
    for n, skip, sizes in (
        (2, 0, (1, 1)),
        (9, 0, (4, 5)),
        (60, 0, (18, 19)),
        (72, 0, (18, 19)),
        (80, 0, (18, 19)),
        (80, 30, (3, 4)),
    ):
        whole = Proxies(n=n, seed=3, skip=skip)
        one, other = (half.draw(source) for half in whole.halves())
        assert sorted(one + other) == whole.draw(source)
        assert (len(one), len(other)) == sizes, n
    with pytest.raises(InputError, match=r"`proxies\.n` is 1; .* needs 2"):
        Proxies(n=1).halves()
    for half in Proxies(skip=36).halves():
        with pytest.raises(InputError, match=r"there is only one image; .* needs 2"):
            half.draw(source)
    with pytest.raises(InputError, match="there are 37, of which 40 are passed over"):
        Proxies(skip=40).draw(source)


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_proxy_image_ends_a_run_of_several_processes(
    tiny_suite: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """One process may leave out the row of a comparison; of several, the others may have read the image."""

    def damaged(*_: object) -> None:
        raise InputError("row 1: not a readable image")

    monkeypatch.setattr(ParquetImages, "__getitem__", damaged)
    data = VisionTasks(str(tiny_suite))
    data.trainer = process(world)
    with pytest.raises(InputError, match="not a readable image") as caught:
        list(data.proxy_loader("colors"))
    assert isinstance(caught.value, EvaluationError) == (world > 1)


def test_every_process_gets_all_proxies(tiny_suite: Path) -> None:
    data = VisionTasks(str(tiny_suite), proxies=Proxies(n=100, split="test"))
    data.trainer = process(world=2, rank=1)
    (images,) = data.proxy_loader("grays")
    everything = whole_split(tiny_suite, "grays", "test")[0]
    assert torch.equal(images.sum((1, 2, 3)).sort().values, everything.sum((1, 2, 3)).sort().values)


def test_proxies_from_another_data_set(tiny_suite: Path, tmp_path: Path) -> None:
    elsewhere = Proxies(n=5, source={"parquet": "data/stripes/val.parquet"})
    data = VisionTasks(str(tiny_suite), proxies=elsewhere)
    data.check(Needs(proxies=True))
    stripes = VisionTasks(str(tiny_suite), proxies=Proxies(n=5))
    for task in TASKS:
        assert torch.equal(next(iter(data.proxy_loader(task))), next(iter(stripes.proxy_loader("stripes"))))
    for number in range(4):
        picture("grays", number, np.random.RandomState(number)).save(tmp_path / f"{number}.png")
    unlabeled = VisionTasks(str(tiny_suite), proxies=Proxies(source={"folder": str(tmp_path)}))
    assert next(iter(unlabeled.proxy_loader("grays"))).shape == (4, 3, 16, 16)


def test_proxies_from_another_data_set_are_decoded_once_for_all_tasks(tiny_suite: Path) -> None:
    data = VisionTasks(str(tiny_suite), proxies=Proxies(n=30, source={"parquet": "data/stripes/val.parquet"}))
    first, *others = [torch.cat(list(data.proxy_loader(task))) for task in TASKS]
    assert data._cache.used == 30 * 3 * 16 * 16, "bytes, once"
    assert all(torch.equal(images, first) for images in others)
    halves = [data.variant(half, data.task_names) for half in data.proxies.halves()]
    assert [len(torch.cat(list(half.proxy_loader("grays")))) for half in halves] == [15, 15], "other draws are kept apart"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"n": 0}, "`proxies.n` must be 1 or more, not 0"),
        ({"seed": -1}, "proxies.seed"),
        ({"label": -2}, "proxies.label"),
        ({"skip": -1}, "proxies.skip"),
        ({"source": {"foldr": "x"}}, "did you mean `folder`"),
    ],
)
def test_bad_proxies(arguments: dict[str, object], hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        Proxies(**arguments)


def test_proxies_read_each_row_group_once(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = VisionTasks(str(tiny_suite), proxies=Proxies(n=30))  # of 37 images in three row groups, of which two are kept
    reads = row_groups_read(monkeypatch)
    list(data.proxy_loader("colors"))
    assert reads == [0, 1, 2]
