"""Pixels kept between passes: whole passes only, within the limit."""

from collections.abc import Iterator

import pytest
import torch

from mergekit_vision.data.pixel_cache import Batch, PixelCache

SIZE = 3 * 4 * 4  # bytes of one image


def batches(images: int, value: int = 0) -> Iterator[Batch]:
    """Pixels of some images, two a batch, and their labels."""
    pixels = torch.full((images, 3, 4, 4), value, dtype=torch.uint8)
    return iter(list(zip(pixels.split(2), torch.arange(images).split(2), strict=True)))


def test_a_whole_pass_is_kept_and_counted() -> None:
    cache = PixelCache(100 * SIZE)
    found = list(cache.keep(("colors", "test"), batches(5, 7)))
    assert [len(pixels) for pixels, _ in found] == [2, 2, 1]
    (kept,) = cache.passes.values()
    assert all(torch.equal(a, b) for one, two in zip(kept, found, strict=True) for a, b in zip(one, two, strict=True))
    assert cache.used == 5 * SIZE


def test_a_pass_that_ends_early_is_not_kept() -> None:
    cache = PixelCache(100 * SIZE)
    next(cache.keep(("colors", "test"), batches(5)))
    assert (cache.passes, cache.used) == ({}, 0)


def test_the_cache_keeps_within_its_limit() -> None:
    cache = PixelCache(5 * SIZE + 10)
    for task in ("colors", "grays"):
        assert sum(len(pixels) for pixels, _ in cache.keep((task, "test"), batches(5))) == 5
    list(cache.keep(("stripes", "test"), iter(())))
    assert list(cache.passes) == [("colors", "test")]
    assert cache.used == 5 * SIZE


def test_of_two_passes_at_once_the_first_to_end_is_kept() -> None:
    cache = PixelCache(100 * SIZE)
    slow, quick = (cache.keep(("colors", "test"), batches(5, value)) for value in (1, 2))
    next(slow)
    list(quick)
    list(slow)
    (kept,) = cache.passes.values()
    assert {int(pixels.max()) for pixels, _ in kept} == {2}
    assert cache.used == 5 * SIZE


def test_what_does_not_fit_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mergekit_vision"):
        cache = PixelCache(5 * SIZE + 10)
        for _ in range(2):
            for task in ("colors", "grays", "stripes"):
                list(cache.keep((task, "test"), batches(5)))
    (record,) = caplog.records
    assert record.getMessage().startswith("grays test: 0 MiB of pixels do not fit into the 0 MiB left of cache_mb")


def test_nothing_is_said_where_nothing_was_to_be_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mergekit_vision"):
        list(PixelCache(0).keep(("grays", "test"), batches(5)))
    assert caplog.records == []


def test_what_is_kept_lies_outside_of_shared_memory() -> None:
    shared = [(pixels.share_memory_(), labels.share_memory_()) for pixels, labels in batches(5)]
    cache = PixelCache(100 * SIZE)
    list(cache.keep(("colors", "test"), iter(shared)))
    (kept,) = cache.passes.values()
    assert len(kept) == 3
    assert not any(part.is_shared() for batch in kept for part in batch)
