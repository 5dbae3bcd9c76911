"""Loaders: the same batches on every pass, from the data or from the cache, on the device they are for."""

import gc
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import changed, joined, process, whole_split
from tiny import encoded, picture
from torch.utils.data import DataLoader

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.loader import ExactSampler, decoding_processes, explained_workers
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.metric import TaskMetric
from mergekit_vision.sources.parquet import ParquetImages


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_mb", [0, 2048])
def test_batches_are_open_clips_bit_by_bit_on_every_pass(tiny_suite: Path, workers: int, cache_mb: int) -> None:
    data = VisionTasks(str(tiny_suite), batch_size=8, num_workers=workers, cache_mb=cache_mb)
    images, labels = whole_split(tiny_suite, "grays", "test")
    for _ in range(3):
        loader = data.loader("grays", "test")
        assert isinstance(loader, DataLoader)
        assert (len(loader), len(loader.dataset)) == (6, 41)
        found = joined(loader)
        assert torch.equal(found[0], images)
        assert torch.equal(found[1], labels)
        assert (found[0].dtype, found[1].dtype) == (torch.float32, torch.int64)


def test_a_complete_pass_is_decoded_once_and_an_incomplete_one_again(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    read = ParquetImages.__getitem__
    monkeypatch.setattr(ParquetImages, "__getitem__", lambda self, index: decoded.append(index) or read(self, index))
    data = VisionTasks(str(tiny_suite), batch_size=8)
    next(iter(data.loader("grays", "test")))
    gc.collect()
    assert len(decoded) == 8
    decoded.clear()
    for _ in range(3):
        list(data.loader("grays", "test"))
    assert decoded == list(range(41))


def test_changing_a_batch_does_not_change_the_next_pass(tiny_suite: Path) -> None:
    data = VisionTasks(str(tiny_suite))
    first = joined(data.loader("colors", "val"))[0].clone()
    for images, labels in data.loader("colors", "val"):
        images.zero_()
        labels.zero_()
    images, labels = joined(data.loader("colors", "val"))
    assert torch.equal(images, first)
    assert torch.equal(labels, whole_split(tiny_suite, "colors", "val")[1])


def test_the_cache_keeps_nothing_in_the_shared_memory_of_workers(tiny_suite: Path) -> None:
    data = VisionTasks(str(tiny_suite), batch_size=8, num_workers=2)
    loader = data.loader("grays", "test")
    joined(loader)
    (batches,) = loader.cache.passes.values()
    assert len(batches) == 6
    assert not any(part.is_shared() for batch in batches for part in batch)


def test_batches_come_on_the_trainers_device(tiny_suite: Path) -> None:
    data = VisionTasks(str(tiny_suite), batch_size=8)
    data.trainer = process(device="meta")
    for _ in range(2):  # decoded, then from the cache, which stays on the host
        assert all(part.is_meta for batch in data.loader("grays", "test") for part in batch)
    assert all(images.is_meta for images in data.proxy_loader("grays"))
    assert not any(
        part.is_meta for batches in data.loader("grays", "test").cache.passes.values() for batch in batches for part in batch
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_nothing_waits_and_the_batches_are_the_same(tiny_suite: Path) -> None:
    data = VisionTasks(str(tiny_suite), batch_size=8)
    expected = joined(data.loader("grays", "test"))
    data.trainer = process(device="cuda:0")
    loader, metric = data.loader("grays", "test"), TaskMetric().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(loader)
        for images, labels in batches:
            metric.update(images[:, :, 0, 0], labels % 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(part.cpu(), whole) for part, whole in zip(joined(batches), expected, strict=True))


@pytest.mark.parametrize(
    ("images", "processes", "accelerated", "workers"),
    [
        (10_000, 1, True, 7),
        (10_000, 4, True, 1),
        (10_000, 8, True, 0),
        (600, 1, True, 2),
        (100, 1, True, 0),
        (10_000, 1, False, 0),
    ],
)
def test_as_many_workers_as_pay_off(
    monkeypatch: pytest.MonkeyPatch, images: int, processes: int, accelerated: bool, workers: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    assert decoding_processes(images, 128, processes, accelerated) == workers


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 9])
def test_sampler_covers_any_length(size: int, world: int) -> None:
    samplers = [ExactSampler(range(size), world, rank) for rank in range(world)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(size))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_stops_with_its_name_alone(root: Path, workers: int) -> None:
    place = root / "photos"
    for number, name in enumerate(("a", "b", "c")):  # one directory a class
        (place / name).mkdir(parents=True)
        (place / name / "1.png").write_bytes(encoded(picture("colors", number, np.random.RandomState(0))))
    (place / "b" / "2.png").write_bytes(b"broken")
    suite = changed(root, lambda tasks: tasks["colors"]["data"].update(test={"folder": "photos"}))
    data = VisionTasks(suite, num_workers=workers)
    with pytest.raises(InputError, match=rf"^{place}/b/2\.png: not a readable image") as caught:
        list(data.loader("colors", "test"))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_is_killed_is_one_line(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    parent = os.getpid()

    def killed(*_: object) -> None:
        assert os.getpid() != parent
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)

    monkeypatch.setattr(ParquetImages, "__getitem__", killed)
    loader = VisionTasks(str(tiny_suite), batch_size=8, num_workers=1).loader("grays", "test")
    with pytest.raises(InputError) as caught, explained_workers():
        list(loader)
    message = str(caught.value)
    assert f"ended by the system ({signal.strsignal(number)})" in message
    assert ("shared memory (/dev/shm) runs out" in message) == (number == signal.SIGBUS)
    assert "`num_workers`" in message
    assert (caught.value.of, message.count("\n")) == ("data", 0)


def test_other_errors_of_workers_are_not_explained() -> None:
    with pytest.raises(RuntimeError, match="Caught ValueError"), explained_workers():
        raise RuntimeError("Caught ValueError in DataLoader worker process 0.")
