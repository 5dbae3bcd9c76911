"""Fixtures for all tests: the real experts where they are at hand, and a tiny suite made on the spot."""

import functools
import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the tests run side by side, each process on one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:  # the process that hands out the tests needs neither torch nor pyarrow
    from loopback_hub import LoopbackHub

    from mergekit_vision.merging.workbench import Workbench

# an example is written over the one before, so that fixtures of a function serve all of them
settings.register_profile(
    "short",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("long", settings.get_profile("short"), max_examples=1500, derandomize=False, print_blob=True)
settings.load_profile("short")

ZOO = Path(os.environ.get("MERGEKIT_VISION_ZOO") or Path(__file__).parents[2] / "shared" / "zoo")
"""Directory of the real experts: ``$MERGEKIT_VISION_ZOO``, else beside the checkout."""


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Take interruptions as in a terminal: a shell starts what runs in its background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def vocabulary() -> Iterator[None]:
    """Read CLIP's vocabulary once: a tokenizer of it only remembers words."""
    import open_clip.factory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.factory, "SimpleTokenizer", functools.lru_cache(open_clip.factory.SimpleTokenizer))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the real experts' tests first: long ones at the end would leave the other processes idle."""
    items.sort(key=lambda item: item.path.name != "test_zoo.py")


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Places for the tests' cache directories; pytest's own would look through all former ones for each."""
    root = tmp_path_factory.mktemp("caches")
    return (root / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def cache(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own."""
    place = next(caches)
    place.mkdir()
    monkeypatch.setenv("MERGEKIT_VISION_CACHE", str(place))
    return place


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Directory of the eight real experts; what needs it is skipped where it is not there."""
    if not (ZOO / "suite.yaml").is_file():
        pytest.skip(f"no real experts in {ZOO} (name their directory in MERGEKIT_VISION_ZOO)")
    return ZOO


@pytest.fixture(scope="session")
def tiny_suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite file with a tiny random CLIP model, three tasks of 37 val and 41 test images, and an expert of each."""
    from tiny import write_suite

    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture
def root(tiny_suite: Path, tmp_path: Path) -> Path:
    """Directory of a copy of the tiny suite that a test may spoil."""
    return Path(shutil.copytree(tiny_suite.parent, tmp_path / "suite"))


@pytest.fixture
def bench(tiny_suite: Path) -> "Workbench":
    """The tiny suite's encoder on a workbench, on the CPU."""
    import torch

    from mergekit_vision.data.datamodule import VisionTasks
    from mergekit_vision.evaluation.evaluator import Runtime
    from mergekit_vision.merging.workbench import Workbench

    return Workbench.open(VisionTasks(str(tiny_suite)), Runtime(torch.device("cpu")))


@pytest.fixture
def loopback_hub(tmp_path: Path) -> Iterator["LoopbackHub"]:
    """An empty Hugging Face hub on the loopback interface, until the test ends."""
    from loopback_hub import LoopbackHub

    with LoopbackHub(tmp_path / "hub").serving() as hub:
        yield hub
