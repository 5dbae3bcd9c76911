import multiprocessing
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_vision.checkpoints import CheckpointWeights, open_weights, save_safetensors
from mergekit_vision.checkpoints.opening import open_container
from mergekit_vision.errors import InputError
from mergekit_vision.support.allocator import release_freed_memory

WEIGHTS = {"conv1.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "proj": torch.linspace(-1, 1, 8).view(4, 2).half()}
TEXT = {"text_projection": torch.zeros(3, 3), "logit_scale": torch.tensor(1.0)}


def write(path: Path, tensors: dict[str, Tensor], legacy: bool = False) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.pth", "x.bin", "x.ckpt", "legacy.pt"])
@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", ""])
def test_keys_values_and_shapes_whatever_the_style(tmp_path: Path, name: str, prefix: str) -> None:
    text = {prefix.removesuffix("visual.") + key: value for key, value in TEXT.items()} if prefix else {}
    stored = {prefix + key: value for key, value in WEIGHTS.items()}
    weights = open_weights(write(tmp_path / name, {**text, **stored}, legacy=name.startswith("legacy")))
    assert sorted(weights) == ["visual.conv1.weight", "visual.proj"]
    assert weights.shapes == {"visual.conv1.weight": (2, 3, 2, 2), "visual.proj": (4, 2)}
    assert weights.path == tmp_path / name
    for key, value in WEIGHTS.items():
        assert torch.equal(weights[f"visual.{key}"], value)
        assert weights[f"visual.{key}"].dtype == value.dtype
    with pytest.raises(KeyError):
        weights["visual.nothing"]


def test_the_content_decides_over_the_suffix(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", WEIGHTS).rename(tmp_path / "x.pt")
    assert torch.equal(open_weights(path)["visual.proj"], WEIGHTS["proj"])
    path = write(tmp_path / "y.pt", WEIGHTS).rename(tmp_path / "y.weights")
    assert torch.equal(open_weights(path)["visual.proj"], WEIGHTS["proj"])


def _sum(weights: CheckpointWeights, results: Any) -> None:
    results.put(float(weights["visual.conv1.weight"].sum()))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "legacy.pt"])
def test_survives_pickling_and_a_fork(tmp_path: Path, name: str) -> None:
    weights = open_weights(write(tmp_path / name, WEIGHTS, legacy=name.startswith("legacy")))
    expected = float(weights["visual.conv1.weight"].sum())
    assert float(pickle.loads(pickle.dumps(weights))["visual.conv1.weight"].sum()) == expected
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_sum, args=(weights, results))
    process.start()
    assert results.get(timeout=60) == expected
    process.join()


@pytest.mark.parametrize(("suffix", "legacy"), [(".safetensors", False), (".pt", False), (".pt", True)])
def test_reading_large_files_takes_no_memory_of_its_own(tmp_path: Path, cache: Path, suffix: str, legacy: bool) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc")

    def anonymous() -> int:
        release_freed_memory()  # of what was freed, an allocator that has been used much holds on to some
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) // 1024

    tensors = {f"visual.{i}": torch.full((4 << 20,), float(i)) for i in range(8)}  # 128 MiB
    tensors["visual.conv1.weight"] = torch.zeros(1, 3, 1, 1)
    paths = [write(tmp_path / f"{number}{suffix}", tensors, legacy) for number in range(2)]
    del tensors
    before = anonymous()
    opened = [open_weights(path) for path in paths]
    assert anonymous() - before < 64  # MiB, of 256; a tensor has 16
    for weights in opened:
        assert sum(float(weights[key].sum()) for key in weights) == sum(range(8)) * (4 << 20)
    assert anonymous() - before < 64  # MiB, of 256; a tensor has 16
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("legacy", [True, False])
def test_tensors_that_are_views_are_read_as_they_are(tmp_path: Path, legacy: bool) -> None:
    """Of one storage behind which another one begins at an odd address, whatever the dtype."""
    whole = torch.arange(60.0, dtype=torch.float64).reshape(3, 4, 5)
    tensors = {
        "bytes": torch.ones(3, dtype=torch.uint8),
        "a": whole[1].T,
        "b": whole[:, 1:3, ::2],
        "c": whole[2, 3, 4],
        "d": whole[3:],
    }
    container = open_container(write(tmp_path / "x.pt", tensors, legacy))
    for name, value in tensors.items():
        read = container.read(name)
        assert torch.equal(read, value), name
        assert (read.dtype, read.data_ptr() % value.element_size()) == (value.dtype, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system of any names")
@pytest.mark.parametrize("name", ["x.pt", "legacy.pt"])
def test_a_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    directory = tmp_path / os.fsdecode(b"\xe9")  # Latin-1, no UTF-8
    directory.mkdir()
    path = write(tmp_path / name, WEIGHTS, legacy=name.startswith("legacy")).rename(directory / name)
    assert torch.equal(open_weights(path)["visual.proj"], WEIGHTS["proj"])


@pytest.mark.parametrize("name", ["x.pt", "legacy.pt"])
def test_a_file_that_goes_before_its_tensors_are_read_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, WEIGHTS, legacy=name.startswith("legacy"))
    weights = open_weights(path)
    path.unlink()
    with pytest.raises(InputError, match=rf"{name}: .*No such file"):
        weights["visual.proj"]


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "legacy.pt"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.95])
def test_truncated_files_are_named(tmp_path: Path, name: str, kept: float) -> None:
    path = write(tmp_path / name, {"visual.conv1.weight": torch.arange(1e4).view(100, 100)}, legacy=name.startswith("legacy"))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=path.name):
        open_weights(path)


def test_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a plain text file of some length")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "text.pt").write_text("<!DOCTYPE html> not a checkpoint")
    for name, hint in (("notes.txt", "neither"), ("lfs.safetensors", "git lfs pull"), ("text.pt", "neither")):
        with pytest.raises(InputError, match=f"{name}.*{hint}"):
            open_weights(tmp_path / name)
    with pytest.raises(InputError, match=r"missing\.pt: cannot be read"):
        open_weights(tmp_path / "missing.pt")
    with pytest.raises(InputError, match=r"cannot be read .*did you mean `lfs\.safetensors`"):
        open_weights(tmp_path / "lsf.safetensors")
    with pytest.raises(InputError, match=r"several files may hold the weights \(lfs\.safetensors, text\.pt"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ([torch.zeros(2)], "holds no tensors"),
        ({}, "holds no tensors"),
        (torch.zeros(2), "holds a single tensor without a name"),
        ({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, r"classification head \(bias, weight\)"),
        ({"model.params.0": torch.zeros(2), "model.params0.0": torch.zeros(2)}, "linearized"),
        ({"visual.trunk.blocks.0.attn.qkv.weight": torch.zeros(2, 2)}, "timm"),
    ],
)
def test_what_holds_no_tower_is_refused_with_the_reason(tmp_path: Path, content: object, hint: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=rf"x\.pt: .*{hint}"):
        open_weights(tmp_path / "x.pt")


def test_save_safetensors_copes_with_views_and_shared_memory(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": matrix, "b": matrix, "c": matrix.T, "d": matrix[1], "e": nn.Parameter(torch.ones(2))}
    save_safetensors(tmp_path / "deep" / "x.safetensors", tensors, {"method": "test"})
    stored = load_file(tmp_path / "deep" / "x.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    assert len(list((tmp_path / "deep").iterdir())) == 1
    from safetensors import safe_open

    with safe_open(tmp_path / "deep" / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "method": "test"}


def test_zoo_expert_opens_without_reading_tensors(zoo: Path) -> None:
    backbone = open_weights(zoo / "base" / "open_clip_model.safetensors")
    assert open_weights(zoo / "experts" / "mnist.safetensors").shapes == backbone.shapes
    assert all(key.startswith("visual.") for key in backbone)
