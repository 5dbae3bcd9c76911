"""Checks of a run before any long work starts."""

import os
import platform
from pathlib import Path
from typing import Any

from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.errors import InputError
from mergekit_vision.export.manifest import read_record
from mergekit_vision.merger import Merger
from mergekit_vision.sources.config import kind_of
from mergekit_vision.sources.footer import matching
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.fingerprints import digest, fingerprint
from mergekit_vision.support.json_files import same
from mergekit_vision.support.source_code import code_fingerprint, versions
from mergekit_vision.support.team import Team
from mergekit_vision.support.writable import place_fault

_WRITTEN = ("results.json", "predictions.csv", "report.html", "config.yaml", "routing.png", "plan.json")


def check_place(directory: str | os.PathLike[str]) -> None:
    """Refuse a directory that cannot be written into.

    Raises:
        InputError: when it, or what is above it, is a file, a link that leads nowhere, or read-only, or cannot be looked at; or
            when it has a directory where a file must go.
    """
    if not os.fspath(directory):
        raise InputError("`default_root_dir` is empty; name a directory", of="trainer")
    if fault := place_fault(Path(directory), _WRITTEN):
        raise InputError(f"`default_root_dir` {os.fspath(directory)}: {fault}", of="trainer")


def check_is_merge(merger: Merger) -> None:
    """Refuse a method that keeps something of each expert instead of merging them.

    Raises:
        InputError: for an oracle.
    """
    if merger.kind == "oracle":
        problem = "is no merge: it must be told each image's task; the command compare shows it beside merges"
        raise InputError(f"`merger` {type(merger).__name__} {problem}", of="model")


def check_merged(directory: Path, suite: Suite, verify: bool = True) -> dict[str, Any]:
    """Refuse a merged model that is not as it was written, or does not belong to a suite.

    Args:
        directory: of the model.
        suite: on which it is to be evaluated.
        verify: whether its files are compared with their checksums.

    Returns:
        What its ``merge.json`` holds.

    Raises:
        InputError: when there is none, its files are not those that were written, or it was merged from another backbone.
    """
    record = read_record(directory, verify)
    merged = describe_backbone(f"local-dir:{directory}")
    backbone = describe_backbone(suite.backbone, suite.pretrained)
    alike = same([merged.tower, merged.preprocess], [backbone.tower, backbone.preprocess])
    if merged.shapes != backbone.shapes or not alike:
        raise InputError(f"{directory}: merged from another backbone than that of {suite.path} ({suite.backbone})")
    return record


def check_same_suite(suite: Suite, former: Suite) -> None:
    """Refuse a suite with another backbone, experts or prompts than that which a model was set up with.

    The images may be others, and tasks may be missing.

    Raises:
        InputError: naming what differs.
    """
    differing = [] if (suite.backbone, suite.pretrained) == (former.backbone, former.pretrained) else ["the backbone"]
    known, given = (
        {name: (task.expert, task.classes, task.templates) for name, task in of.tasks.items()} for of in (former, suite)
    )
    differing += [f"task {name}" for name in given if known.get(name) != given[name]]
    if differing:
        remedy = "make a new `MergedCLIP`; for a model that is saved, with its directory as `merged`"
        problem = f"differs from the suite that the model was set up with in {', '.join(differing)}"
        raise InputError(f"{suite.path}: {problem}; {remedy}")


def check_processes(processes: int, images: int) -> None:
    """Refuse more processes than images.

    Raises:
        InputError: when some process would have none.
    """
    if images < processes:
        raise InputError(f"`devices`: {processes} processes for {images} images; take fewer", of="trainer")


def check_alike(data: VisionTasks, needs: Needs, team: Team) -> None:
    """Refuse processes that do not see the same packages and files; of a single one there is nothing to check.

    Raises:
        InputError: on every process, naming what differs.
    """
    if team.size == 1:
        return
    places = team.gather(_places(data, needs))
    same = places.count(places[0]) == len(places)
    first, *others = team.gather(_seen(data, needs, read=not same))
    for rank, seen in enumerate(others, start=1):
        if differing := [what for what in first if seen.get(what) != first[what]]:
            raise InputError(
                f"process {rank} of {team.size} sees another version than process 0 of: {', '.join(differing)}; "
                "give all processes the same packages and files"
            )


def _places(data: VisionTasks, needs: Needs) -> str:
    """Where the code and the experts lie, as no other machine says it: where this is the same, they are the same files."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    experts = [file for name in data.suite.tasks for file in data.suite.experts[name].files] if needs.experts else []
    found = [(str(file), *_identity(file)) for file in (Path(__file__), *experts)]
    return repr((platform.node(), boot.read_text() if boot.exists() else "", found))


def _identity(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _seen(data: VisionTasks, needs: Needs, read: bool) -> dict[str, str]:
    """What must be the same for all processes -> its version or hash; of images that are many files, their number.

    Code and experts are left out unless they are to be ``read``, which takes seconds on every process.
    """
    suite = data.suite
    found = {**versions(), str(suite.path): fingerprint(suite.path)}
    if read:
        found["mergekit_vision's code"] = code_fingerprint([VisionTasks]) or ""
    if read and needs.experts:
        found |= {str(task.expert): suite.experts[name].fingerprint() for name, task in suite.tasks.items()}
    for name, task in suite.tasks.items():
        for split in sorted({*needs.everywhere, *(needs.evaluated if name in data.task_names else ())}):
            source, images = task.data[split], str(data.size(name, split))
            files = matching(Path(str(source["parquet"]))) if kind_of(source) == "parquet" else []
            found[f"tasks.{name}.data.{split}"] = digest(images, *map(fingerprint, files))
    return found
