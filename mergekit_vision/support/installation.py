"""Whether the installed packages are those that this one needs. Their metadata is read; none of them is imported."""

import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Literal

from mergekit_vision.support.verdicts import Verdict
from mergekit_vision.version import __version__

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_OWN = "mergekit-vision"

_COMPROMISED = {"lightning": ("2.6.2", "2.6.3")}
"""Package -> its releases on PyPI that held malicious code."""

_REMARKS = {
    "open_clip_torch": ("2.29", "QuickGELU goes by the model's name: OpenAI's weights need one that ends in -quickgelu"),
    "datasets": ("4", "no data set that is a script is loaded: name another copy, or the revision refs/convert/parquet"),
}
"""Package -> the version since which it behaves otherwise, and how."""

_EXTRAS = {"hub": "data sets of the hub", "hf": "export to transformers and peft", "onnx": "export to ONNX"}
"""Extra of this package -> what it is for."""


def installed(package: str) -> str | None:
    """The version of a package; ``None`` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def compromised() -> list[str]:
    """Installed releases that must not even be imported, such as ``lightning 2.6.2``."""
    return [f"{name} {found}" for name, bad in _COMPROMISED.items() if (found := installed(name)) in bad]


def python_verdicts() -> Iterator[Verdict]:
    """The interpreter and this package."""
    yield Verdict("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Verdict("ok", _OWN, __version__)


def package_verdicts() -> Iterator[Verdict]:
    """This package's requirements: those that are met in one line, and one for each that is not."""
    from packaging.requirements import Requirement

    groups: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, requires(_OWN) or ()):
        marked = re.search(r'extra == "(\w+)"', str(requirement.marker))
        groups.setdefault(marked[1] if marked else "", []).append(requirement)
    yield from _needed(groups.pop("", []))
    for extra, purpose in _EXTRAS.items():
        yield from _optional(extra, purpose, groups.get(extra, []))
    yield from _remarks()


def _needed(requirements: "list[Requirement]") -> Iterator[Verdict]:
    faults = {requirement.name: _fault(requirement) for requirement in requirements}
    met = [f"{name} {installed(name)}" for name, fault in faults.items() if fault is None]
    yield Verdict("ok", "packages", ", ".join(met))
    yield from filter(None, faults.values())


def _optional(extra: str, purpose: str, requirements: "list[Requirement]") -> Iterator[Verdict]:
    missing = [requirement.name for requirement in requirements if installed(requirement.name) is None]
    faults = [_fault(requirement) for requirement in requirements if requirement.name not in missing]
    if missing:
        level: Literal["ok", "warning"] = "warning" if extra == "hub" else "ok"  # without it no published suite can be had
        text = f"{', '.join(missing)} not installed; for {purpose}: pip install '{_OWN}[{extra}]'"
        yield Verdict(level, f"extra {extra}", text)
    elif not any(faults):
        found = (f"{requirement.name} {installed(requirement.name)}" for requirement in requirements)
        yield Verdict("ok", f"extra {extra}", ", ".join(found))
    yield from filter(None, faults)


def _fault(requirement: "Requirement") -> Verdict | None:
    name, found = requirement.name, installed(requirement.name)
    remedy = f"pip install '{name}{requirement.specifier}'"
    if found is None:
        return Verdict("fault", name, f"is not installed; {remedy}")
    if found in _COMPROMISED.get(name, ()):
        text = (
            f"{found} was published with malicious code; {remedy}, and replace every password and token that this machine holds"
        )
        return Verdict("fault", name, text)
    if not requirement.specifier.contains(found, prereleases=True):
        return Verdict("fault", name, f"{found} is installed, and {requirement.specifier} is needed; {remedy}")
    return None


def _remarks() -> Iterator[Verdict]:
    from packaging.version import Version

    for name, (since, text) in _REMARKS.items():
        found = installed(name)
        if found is not None and Version(found) >= Version(since):
            yield Verdict("ok", name, f"since {since} {text}")
