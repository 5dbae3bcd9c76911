"""Data sets of a hub: their revisions, private ones, and those that are not at hand offline."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from loopback_hub import READER, LoopbackHub, point_at
from pictures import image, numbered, table
from tiny import encoded

from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import check_source
from mergekit_vision.sources.opening import open_source

TOY = {"hub": "org/toy", "split": "test"}


@pytest.fixture
def hub(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub with a data set of two images, three since ``v2``, that this process uses without a token."""
    pytest.importorskip("datasets")
    for tag, labels in (("v1", [1, 0]), ("v2", [1, 0, 1])):
        pq.write_table(table([encoded(image(1))] * len(labels), [*labels], ["x", "y"]), tmp_path / "test.parquet")
        loopback_hub.commit("org/toy", {"data/test.parquet": tmp_path / "test.parquet"}, kind="dataset", tag=tag)
    point_at(loopback_hub, tmp_path / "home", monkeypatch)
    return loopback_hub


def offline(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(hub, tmp_path / "home", monkeypatch, offline=True)


def refusal(config: dict[str, str]) -> str:
    """What both the check and the opening of a source say against it."""
    with pytest.raises(InputError) as caught:
        open_source(config)
    assert check_source(config, numbered(2)) == [str(caught.value)]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_revision_is_honored(hub: LoopbackHub) -> None:
    for revision, labels in (("v1", [1, 0]), ("v2", [1, 0, 1]), (hub.repositories["dataset", "org/toy"].refs["v1"], [1, 0])):
        source = open_source({**TOY, "revision": revision})
        assert (source.names, list(source.labels())) == (("x", "y"), labels)
    assert len(open_source(TOY)) == 3
    assert "Revision 'v9' doesn't exist" in refusal({**TOY, "revision": "v9"})


def test_a_part_of_a_split(hub: LoopbackHub) -> None:
    assert len(open_source({**TOY, "split": "test[:2]"})) == 2


def test_a_private_one_is_refused_without_a_token(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/secret", {"data/test.parquet": tmp_path / "test.parquet"}, kind="dataset", private=True)
    secret = {**TOY, "hub": "org/secret"}
    assert "org/secret: cannot be loaded" in refusal(secret)
    assert refusal(secret).endswith("if it is private, log in by `hf auth login` or set HF_TOKEN")
    point_at(hub, tmp_path / "home", monkeypatch, token=READER)
    assert len(open_source(secret)) == 3


def test_a_connection_that_is_reset_is_one_line(hub: LoopbackHub) -> None:
    hub.interrupt("org/toy", "data/test.parquet", after=100, kind="dataset", reset=True)
    with pytest.raises(InputError, match=r"org/toy: cannot be loaded by `datasets` \(.*reset by peer") as caught:
        open_source(TOY)
    assert "\n" not in str(caught.value)
    assert len(open_source(TOY)) == 3


def test_loose_images_where_the_cache_is_a_link(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk")
    point_at(hub, tmp_path / "linked", monkeypatch)
    files = {f"test/{name}/1.png": encoded(image(number)) for number, name in enumerate(("cat", "dog"), start=1)}
    hub.commit("org/pets", files, kind="dataset")
    source = open_source({"hub": "org/pets", "split": "test"})
    assert (source.names, source[1][1], source[1][0].getpixel((0, 0))) == (("cat", "dog"), 1, (2, 4, 100))


def test_offline_without_a_copy(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(hub, tmp_path, monkeypatch)
    hub.requests.clear()
    assert refusal(TOY).startswith("org/toy: not on this machine, and HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_offline_the_copy_must_be_of_the_revision(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_source({**TOY, "revision": "v1"})
    first, second = (hub.repositories["dataset", "org/toy"].refs[tag] for tag in ("v1", "v2"))
    offline(hub, tmp_path, monkeypatch)
    for revision in ("v1", first):
        assert len(open_source({**TOY, "revision": revision})) == 2
    assert len(open_source(TOY)) == 2
    for revision in ("v2", second):
        assert f"not known to be of revision '{revision}' (it is of commit {first})" in refusal({**TOY, "revision": revision})
