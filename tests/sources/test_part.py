"""Parts of a source: the validation images that the field takes from train splits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import numbered

from mergekit_vision.sources.checks import check_source
from mergekit_vision.sources.config import config_faults, resolve
from mergekit_vision.sources.opening import open_source
from mergekit_vision.sources.part import part_indices


@pytest.mark.parametrize(
    ("images", "cap", "first"),
    [
        pytest.param(60000, True, [30102, 43764, 35133], id="mnist"),
        pytest.param(60000, False, [57000, 58148, 9287], id="mnist without the cap"),
        pytest.param(8144, True, [4911, 3784, 4704], id="cars"),
        pytest.param(19850, True, [13972, 5988, 5694], id="sun397"),
        pytest.param(18900, True, [12209, 6361, 1107], id="resisc45"),
        pytest.param(21600, True, [15776, 6821, 13488], id="eurosat"),
        pytest.param(73257, True, [46097, 42966, 60224], id="svhn"),
        pytest.param(26640, True, [25972, 1985, 19003], id="gtsrb"),
        pytest.param(3760, True, [180, 750, 2533], id="dtd"),
    ],
)
def test_the_indices_are_the_published_ones(images: int, cap: bool, first: list[int]) -> None:
    val, train = part_indices(images, "val", cap), part_indices(images, "train", cap)
    assert val[:3] == first
    assert len(val) == (min(images // 10, 5000) if cap else images // 10)
    assert sorted(val + train) == list(range(images))


def test_the_division_is_that_of_random_split() -> None:
    """As task_vectors and TALL divide: train first, val behind it."""
    parts = torch.utils.data.random_split(range(60000), [55000, 5000], torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert [list(part.indices) for part in parts] == [part_indices(60000, part) for part in ("train", "val")]
    assert part_indices(60000, "train")[0] == 36044


@pytest.mark.parametrize("kind", ["parquet", "folder", "hub"])
def test_each_kind_of_source_has_parts(kind: str, tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = source_of(kind, tiny_suite.parent / "data" / "colors" / "test.parquet", tmp_path, monkeypatch)
    whole, val, train = (open_source({**config, **part}) for part in ({}, {"part": "val"}, {"part": "train"}))
    assert (len(whole), len(val), len(train)) == (41, 4, 37)
    indices = sorted(part_indices(41, "val"))
    assert list(val.labels()) == [whole.labels()[index] for index in indices]
    assert [val[i][0].tobytes() for i in range(4)] == [whole[index][0].tobytes() for index in indices]
    assert len({source.fingerprint() for source in (whole, val, train)}) == 3
    assert val.names == whole.names
    assert check_source({**config, "part": "val"}, ["red", "green", "blue"] if kind != "folder" else numbered(3)) == []


def source_of(kind: str, file: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same images as a source of a kind."""
    if kind == "folder":
        images = open_source({"parquet": str(file)})
        for index, label in enumerate(images.labels()):
            path = place / "photos" / str(label) / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images[index][0].save(path)
        return {"folder": str(place / "photos")}
    if kind == "hub":
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        (place / "toy").mkdir()
        (place / "toy" / "test.parquet").write_bytes(file.read_bytes())
        return {"hub": str(place / "toy"), "split": "test"}
    return {"parquet": str(file)}


def test_a_part_of_too_few_images_holds_none(parquet: Path) -> None:
    assert check_source({"parquet": str(parquet), "part": "val"}, ["a", "b", "c"]) == ["holds no images"]


def test_faults_are_named(tmp_path: Path) -> None:
    assert config_faults({"folder": "a", "part": "test"}) == ["part: must be val or train, not the str 'test'"]
    assert config_faults({"folder": "a", "cap": False}) == ["`cap` goes with `part`"]
    assert resolve({"folder": "a", "part": "val"}, tmp_path) == {"folder": str(tmp_path / "a"), "part": "val"}
