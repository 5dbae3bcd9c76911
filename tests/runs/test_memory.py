"""Memory that runs out."""

import os
import re
from pathlib import Path

import pytest
import torch
from killing import at_once
from pictures import image

from mergekit_vision import InputError, MergedCLIP, Merger, Trainer, VisionTasks
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.trim import Trim
from mergekit_vision.runs.memory import Setting, explained_memory, settings_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


SETTINGS = [
    Setting("model.experts", 8, "experts"),
    Setting("data.proxies.n", 32, "proxy images"),
    Setting("data.batch_size", 1, "images a batch"),
]
OF_CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 10.00 GiB is free. "
    "Including non-PyTorch memory, this process has 69.10 GiB memory in use. Of the allocated memory 60.00 GiB is allocated by "
    "PyTorch, and 2.00 GiB is reserved by PyTorch but unallocated. See the documentation."
)


def test_what_torch_could_not_get_is_said() -> None:
    """So much that not even one expert would fit, of which nothing is said."""
    with pytest.raises(InputError) as caught, explained_memory("merging", CPU, lambda: SETTINGS):
        torch.empty(1 << 60, dtype=torch.uint8)
    needed, free, remedy = str(caught.value).split(", ", 2)
    assert needed == "merging ran out of memory on cpu (1073741824.0 GiB more were needed at once"
    assert re.fullmatch(r"[\d.]+ [MG]iB were taken by this process and [\d.]+ [MG]iB free\); merge fewer experts", free)
    assert remedy == "take fewer proxy images or a smaller batch, or free memory"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "; use the CPU (`trainer.accelerator` cpu), or merge fewer experts"),
        (
            torch.cuda.OutOfMemoryError(OF_CUDA),
            " (20.0 GiB more were needed at once, 60.0 GiB were taken by this process and 12.0 GiB free); changed alone, at most "
            "7 of 8 experts (`model.experts`) or 28 of 32 proxy images (`data.proxies.n`) would fit; use the CPU",
        ),
        (torch.cuda.OutOfMemoryError(OF_CUDA[:70]), " (20.0 GiB more were needed at once); use the CPU"),
    ],
)
def test_an_accelerator_says_what_would_fit_and_has_the_cpu_beside_it(error: Exception, message: str) -> None:
    with pytest.raises(InputError) as caught, explained_memory("merging", GPU, lambda: SETTINGS):
        raise error
    assert str(caught.value).startswith(f"merging ran out of memory on cuda:0{message}")


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/statm").is_file(), reason="limits are read on Linux")
@pytest.mark.parametrize(("devices", "shares"), [(1, ""), (2, r"1 of 2 processes \(`trainer\.devices`\)")])
def test_what_is_said_to_fit_follows_from_what_was_taken(devices: int, shares: str) -> None:
    """Each of six experts takes 100 MiB, and there is room for three and a half, as is known once the fourth does not fit."""

    def take(number: int) -> None:
        taken = []
        while len(taken) < number:
            taken.append(torch.zeros(100 << 20, dtype=torch.uint8))

    def merge() -> None:
        import resource

        torch.zeros(1 << 20)
        room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (350 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        experts = SETTINGS[0]._replace(now=6)
        with pytest.raises(InputError) as caught, explained_memory("merging", CPU, lambda: [experts], devices):
            take(experts.now)
        said = re.search(r"at most (\d) of 6 experts \(`model\.experts`\)(?: or (.*))? would fit", str(caught.value))
        assert said
        assert said[1] in ("4", "5")
        assert re.fullmatch(shares, said[2] or "")

    at_once(merge)


def test_a_small_allocation_that_failed_tells_nothing_of_what_would_fit() -> None:
    error = torch.cuda.OutOfMemoryError(OF_CUDA.replace("20.00 GiB", "12.50 GiB"))
    with pytest.raises(InputError, match=r"12.0 GiB free\); use the CPU"), explained_memory("merging", GPU, lambda: SETTINGS):
        raise error


def test_other_errors_are_not_explained() -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"), explained_memory("merging", CPU):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(("merger", "images"), [(SMILE(), False), (SMILE(rule="sim"), True), (Trim(base=ESM()), True)], ids=repr)
def test_proxy_images_count_where_the_method_looks_at_them(tiny_suite: Path, merger: Merger, images: bool) -> None:
    named = [setting.argument for setting in settings_of(MergedCLIP(merger), VisionTasks(str(tiny_suite)))]
    assert ("data.proxies.n" in named) == images


@pytest.mark.parametrize("command", ["validate", "test", "predict", "compare"])
def test_every_command_says_so(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def spent(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Average, "merge", spent)
    trainer = Trainer(default_root_dir=str(tmp_path / "out"), accelerator="cpu")
    image(1).save(tmp_path / "a.png")
    model = MergedCLIP(None if command == "compare" else Average())
    options = {"predict": ("colors", str(tmp_path / "a.png")), "compare": (["Average"],)}
    with pytest.raises(InputError, match=r"ing ran out of memory on cpu \(.* were taken .* free\); merge fewer experts"):
        getattr(trainer, command)(model, VisionTasks(str(tiny_suite)), *options.get(command, ()))
    assert not (tmp_path / "out").exists()
