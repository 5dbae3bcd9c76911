"""What of a suite is on this machine."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from loopback_hub import LoopbackHub, point_at
from pictures import image, table
from safetensors.torch import save, save_file
from tiny import encoded

from mergekit_vision.checkpoints import ExpertSource
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.presence import Presence, expert_presence, source_presence

WEIGHTS = save({"x": torch.zeros(5)})


@pytest.fixture
def hub(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The hub, as this process sees it."""
    point_at(loopback_hub, tmp_path / "home", monkeypatch)
    return loopback_hub


def expert(text: str) -> ExpertSource:
    return ExpertSource.parse(text, Path("/"))


def test_experts_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    assert expert_presence(ExpertSource(file)) == Presence(False, None, str(file))
    save_file({"x": torch.zeros(5)}, file)
    assert expert_presence(ExpertSource(file)) == Presence(True, len(WEIGHTS), str(file))
    assert expert_presence(ExpertSource(tmp_path)).bytes == len(WEIGHTS)


def test_a_directory_without_one_of_its_parts_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(WEIGHTS)
    names = '{"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(names)
    assert not expert_presence(ExpertSource(tmp_path)).here
    (tmp_path / "model-2.safetensors").write_bytes(WEIGHTS)
    assert expert_presence(ExpertSource(tmp_path)).bytes == 2 * len(WEIGHTS)
    inner = tmp_path / "checkpoint-100"
    inner.mkdir()
    (inner / "model.safetensors").write_bytes(WEIGHTS)  # which opening the directory does not look at
    assert expert_presence(ExpertSource(tmp_path)).bytes == 2 * len(WEIGHTS)


def test_experts_on_the_hub(hub: LoopbackHub) -> None:
    hub.commit("org/expert", {"model.safetensors": WEIGHTS, "config.json": "{}"})
    source = expert("hf-hub:org/expert")
    assert expert_presence(source) == Presence(False, None, "hf-hub:org/expert")
    assert hub.requests == []
    place = source.fetch()
    hub.requests.clear()
    assert expert_presence(source) == Presence(True, len(WEIGHTS), str(place))
    (place / "model.safetensors").unlink()  # as after a download that broke off
    assert not expert_presence(source).here
    assert not expert_presence(expert("hf-hub:org/expert@v2")).here
    assert hub.requests == []


def test_the_size_of_published_experts_is_known(hub: LoopbackHub) -> None:
    assert expert_presence(expert("hf-hub:tanganke/clip-vit-base-patch32_mnist")).bytes == 350_000_000
    assert hub.requests == []


@pytest.mark.parametrize("name", ["org/toy", "1aurent/PatchCamelyon", "Org/GTSRBTestSet2"])
def test_data_on_the_hub(hub: LoopbackHub, tmp_path: Path, name: str) -> None:
    pytest.importorskip("datasets")
    pq.write_table(table([encoded(image(1))] * 2, [1, 0], ["x", "y"]), tmp_path / "test.parquet")
    hub.commit(name, {"data/test.parquet": tmp_path / "test.parquet"}, kind="dataset")
    source = {"hub": name, "split": "test"}
    assert source_presence(source) == Presence(False, None, name)
    assert hub.requests == []
    open_source(source)
    hub.requests.clear()
    found = source_presence({**source, "split": "test[:1]"})
    assert found.here
    assert found.bytes
    assert Path(found.place).is_relative_to(tmp_path / "home")
    assert not source_presence({**source, "split": "train"}).here
    assert not source_presence({**source, "revision": "0" * 40}).here
    assert hub.requests == []


def test_data_on_disk(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    assert not source_presence({"folder": str(tmp_path)}).here
    (tmp_path / "cats" / "1.png").write_bytes(encoded(image(1)))
    assert source_presence({"folder": str(tmp_path)}) == Presence(True, len(encoded(image(1))), str(tmp_path))
    pattern = str(tmp_path / "*.parquet")
    assert source_presence({"parquet": pattern}) == Presence(False, None, pattern)
    (tmp_path / "a.parquet").write_bytes(b"12345")
    assert source_presence({"parquet": pattern}) == Presence(True, 5, pattern)


def test_data_of_classes(tmp_path: Path) -> None:
    mnist = {"torchvision": "torchvision.datasets.FakeData", "args": {"size": 3}}
    assert source_presence(mnist).here
    mnist = {"torchvision": "torchvision.datasets.MNIST", "args": {"root": str(tmp_path), "download": True}}
    assert source_presence(mnist) == Presence(False, None, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
