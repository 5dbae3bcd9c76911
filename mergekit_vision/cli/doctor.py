"""``mergekit-vision doctor``: whether the installation and the machine are sound, one verdict a line."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mergekit_vision.cli.plain_parser import PlainParser
from mergekit_vision.cli.self_check import self_check
from mergekit_vision.errors import InputError
from mergekit_vision.support import hardware, installation
from mergekit_vision.support.cache_contents import clear_cache, kept
from mergekit_vision.support.files import cache_dir
from mergekit_vision.support.hub import refusal
from mergekit_vision.support.terminal import harmless
from mergekit_vision.support.verdicts import Verdict, verdicts
from mergekit_vision.support.writable import place_fault

_PATIENCE = 3.0  # seconds for the hub's answer


def doctor(arguments: list[str]) -> None:
    """Check the installation and the machine, or clear the cache.

    Nothing heavy is imported before it was found that it may be: what is printed by then stands, whatever an import does.

    Args:
        arguments: of the command.

    Raises:
        InputError: when there is a fault, after all verdicts were printed.
        SystemExit: after ``--help``.
    """
    chosen = parser().parse_args(arguments)
    if chosen.clear_cache:
        _clear()
        return
    faults = 0
    for verdict in _all(chosen.offline):
        print(harmless(str(verdict)), flush=True)
        faults += verdict.level == "fault"
    if faults:
        raise InputError(f"doctor: {faults} {'fault' if faults == 1 else 'faults'}, see above")


def parser() -> PlainParser:
    """The parser of the command's options."""
    parser = PlainParser("doctor", "Check the installation and the machine, one verdict a line: ok, warning or fault.")
    parser.add_argument("--offline", action="store_true", help="do not ask the hub whether it answers")
    clear = "remove what is remembered of earlier runs, say what it was, and check nothing; data sets stay"
    parser.add_argument("--clear-cache", action="store_true", help=clear)
    return parser


def _all(offline: bool) -> Iterator[Verdict]:
    yield from installation.python_verdicts()
    yield from verdicts("packages", installation.package_verdicts, "pip install --force-reinstall mergekit-vision")
    bad = installation.compromised()
    if bad:
        yield Verdict("fault", "self-check", f"left out, as {' and '.join(bad)} must not be imported")
    else:
        yield from _of_torch()
    yield from verdicts("memory", hardware.memory_verdicts)
    yield from verdicts("disk", lambda: hardware.disk_verdicts([cache_dir(), *_downloads()]))
    yield from verdicts("cache", _cache)
    yield from verdicts("hub", partial(_hub, offline), "pip install --upgrade huggingface_hub")
    if not bad:
        yield from verdicts("self-check", self_check)


def _of_torch() -> Iterator[Verdict]:
    remedy = "install torch anew, see pytorch.org"
    yield from verdicts("torchvision", hardware.torchvision_verdicts, remedy)
    yield from verdicts("devices", hardware.device_verdicts, remedy)
    yield from verdicts("processes", hardware.process_verdicts, "runs of several processes will not start")
    yield from verdicts("threads", hardware.thread_verdicts, remedy)


def _downloads() -> list[Path]:
    """Where experts and data sets of the hub are kept."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return []
    return [Path(HF_HUB_CACHE)]


def _cache() -> Iterator[Verdict]:
    place, found = cache_dir(), kept()
    if fault := place_fault(place):
        yield Verdict("warning", "cache", f"{fault}; until then nothing is remembered")
        return
    size = f"{sum(each.size for each in found) / 1e6:.1f} MB of earlier results in {place}"
    yield Verdict("ok", "cache", f"{size}; `mergekit-vision doctor --clear-cache` removes them")


def _hub(offline: bool) -> Iterator[Verdict]:
    from huggingface_hub import constants, get_token

    if offline:
        return
    if constants.HF_HUB_OFFLINE:
        yield Verdict("warning", "hub", "HF_HUB_OFFLINE is set: only what was downloaded before can be used")
    elif reason := refusal(constants.ENDPOINT, _PATIENCE):
        text = f"{constants.ENDPOINT} cannot be reached ({reason}): only what was downloaded before can be used"
        yield Verdict("warning", "hub", text)
    else:
        login = "logged in" if get_token() else "not logged in, which private and gated repositories need (`hf auth login`)"
        yield Verdict("ok", "hub", f"{constants.ENDPOINT} answers; {login}")


def _clear() -> None:
    removed = list(clear_cache())
    for found in removed:
        print(harmless(f"removed {len(found.places)} of {found.folder}, {found.size / 1e6:.1f} MB"))
    if not removed:
        print(harmless(f"nothing to remove in {cache_dir()}"))
