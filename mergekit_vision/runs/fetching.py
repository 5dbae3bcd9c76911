"""Downloading everything that a suite needs, so that it runs without a network."""

import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from mergekit_vision.errors import InputError
from mergekit_vision.runs.needed import Needed, needed
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.console import logger
from mergekit_vision.support.faults import closest, in_one_line
from mergekit_vision.support.hub import without_retries
from mergekit_vision.support.paths import nearest
from mergekit_vision.support.transfer import transfer

_GB = 1e9


def fetch_suite(suite: Suite, tasks: Sequence[str] = ()) -> None:
    """Download, verify and open what a suite needs; what is here already is verified too.

    One thing that cannot be had does not keep the others from being downloaded. What broke off goes on where it ended.

    Args:
        suite: the suite.
        tasks: those whose experts and data are needed; all unless given.

    Raises:
        InputError: for a task that is not in the suite, when the disk is too small, or at the end with what is missing, and why.
    """
    unknown = [name for name in tasks if name not in suite.tasks]
    if unknown:
        named = ", ".join(f"{name}{closest(name, suite.tasks)}" for name in unknown)
        raise InputError(f"`tasks`: not in the suite: {named}; it has {', '.join(suite.tasks)}", of="command")
    with without_retries(), _silent_libraries():
        wanted = list(needed(suite, [name for name in suite.tasks if not tasks or name in tasks]))
        space = {each.name: list(each.space()) for each in wanted}
        _check_space(place for places in space.values() for place in places)
        expected = {name: sum(size for _, size in places[:1]) for name, places in space.items()}
        missing = _fetched(wanted, expected)
    if missing:
        listed = [f"{name}: {reason}" for name, reason in missing.items()]
        raise InputError("\n  ".join([f"{suite.path}: missing {len(missing)} of {len(wanted)}", *listed]))
    logger.info("%s: all is here; with HF_HUB_OFFLINE=1 it runs without a network", suite.name)


def _fetched(wanted: Sequence[Needed], expected: dict[str, int]) -> dict[str, str]:
    """Why things cannot be had, by their names."""
    missing = {}
    with transfer(sum(expected.values())) as progress:
        for each in wanted:
            try:
                with progress.of(each.name, each.folder, expected[each.name]), redirect_stderr(io.StringIO()):  # their own bars
                    each.get()
            except Exception as error:  # whatever a library raises, the others can still be had
                reason = str(error) if isinstance(error, InputError) else in_one_line(error)
                missing[each.name] = reason.removeprefix(f"{each.name}: ")  # which the list says
                logger.info("%s: missing", each.name)
    return missing


def _check_space(places: Iterable[tuple[Path, int]]) -> None:
    """Refuse to begin what the disks cannot hold.

    Args:
        places: directories, each with the bytes that go there.

    Raises:
        InputError: with what is needed and free.
    """
    wanted: dict[int, tuple[Path, int]] = {}
    for place, size in places:
        above = nearest(place)
        device = above.stat().st_dev
        wanted[device] = (above, wanted.get(device, (above, 0))[1] + size)
    for place, size in wanted.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise InputError(
                f"{place}: {size / _GB:.1f} GB are to be downloaded and unpacked, and {free / _GB:.1f} GB are free; make room, "
                "name another disk by HF_HOME and MERGEKIT_VISION_CACHE, or fetch fewer tasks"
            )


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Without the bars of the hub's libraries, which know single files."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
