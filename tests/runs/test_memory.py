"""Memory that runs out."""

from pathlib import Path

import pytest
import torch
from pictures import image

from mergekit_vision import InputError, MergedCLIP, Trainer, VisionTasks
from mergekit_vision.plugins.average import Average
from mergekit_vision.runs.memory import explained_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_what_torch_could_not_get_is_said() -> None:
    with (
        pytest.raises(
            InputError, match=r"^merging ran out of memory on cpu \(\d+ bytes more were needed at once\); merge"
        ) as caught,
        explained_memory("merging", CPU),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "^merging ran out of memory on cuda:0; use the CPU"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB"),
            r"on cuda:0 \(2.50 GiB more were needed at once\); use the CPU \(`accelerator` cpu\), or merge fewer experts",
        ),
    ],
)
def test_an_accelerator_has_the_cpu_beside_it(error: Exception, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught, explained_memory("merging", GPU):
        raise error
    assert caught.value.of == "trainer"


def test_other_errors_are_not_explained() -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"), explained_memory("merging", CPU):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("command", ["validate", "test", "predict", "compare"])
def test_every_command_says_so(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def spent(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Average, "merge", spent)
    trainer = Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu")
    image(1).save(tmp_path / "a.png")
    model = MergedCLIP(None if command == "compare" else Average())
    options = {"predict": ("colors", str(tmp_path / "a.png")), "compare": (["Average"],)}
    with pytest.raises(InputError, match=r"ing ran out of memory on cpu; merge fewer experts"):
        getattr(trainer, command)(model, VisionTasks(str(tiny_suite)), *options.get(command, ()))
    assert not (tmp_path / "out").exists()
