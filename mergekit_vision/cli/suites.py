"""``mergekit-vision suites``: the published suites that come with the package."""

import json
from collections.abc import Iterable
from typing import Any

from mergekit_vision.cli.plain_parser import PlainParser
from mergekit_vision.errors import InputError
from mergekit_vision.suites.catalog import PublishedSuite, PublishedTask, published
from mergekit_vision.support.faults import closest


def parser() -> PlainParser:
    """The parser of the command's options."""
    made = PlainParser("suites", "List the published suites that come with the package, and what each needs.")
    made.add_argument("name", nargs="?", help="a suite, to list its tasks")
    made.add_argument("--json", action="store_true", help="print JSON: a list of suites, or of the tasks of one")
    return made


def list_suites(arguments: list[str]) -> None:
    """Print the published suites, or the tasks of one.

    Args:
        arguments: of the command.

    Raises:
        InputError: for an unknown option or suite.
        SystemExit: after ``--help``.
    """
    chosen = parser().parse_args(arguments)
    if chosen.name is not None and chosen.name not in published():
        raise InputError(f"suites: no published suite {chosen.name}{closest(chosen.name, published())}")
    suite = None if chosen.name is None else PublishedSuite.load(chosen.name)
    if chosen.json:
        rows = [*map(needs, map(PublishedSuite.load, published()))] if suite is None else [*map(described, suite.tasks.values())]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif suite is None:
        _show_suites(map(PublishedSuite.load, published()))
    else:
        _show_tasks(suite)


def needs(suite: PublishedSuite) -> dict[str, Any]:
    """What a suite needs: experts in GB (10^9 bytes), images of each published split, licenses where known."""
    licenses = {name: task.license for name, task in suite.tasks.items() if task.license}
    return {
        "name": suite.name,
        "tasks": list(suite.tasks),
        "experts_gb": round(suite.expert_gb * len(suite.tasks), 1),
        "experts_license": suite.experts_license,
        "images": {split: sum(task.images[split] for task in suite.tasks.values()) for split in ("train", "test")},
        "data_licenses": licenses,
        "validation": suite.validation,
        "caveat": suite.caveat,
    }


def described(task: PublishedTask) -> dict[str, Any]:
    """A task: its expert, its data, and what is to be known of both."""
    content = task.content
    return {
        "name": task.name,
        "title": task.title,
        "classes": len(content["classes"]),
        "images": dict(task.images),
        "expert": task.expert,
        "accuracy": content.get("accuracy"),
        "data": content["data"]["test"],
        "license": task.license,
        "variant": task.variant,
        "traps": content["traps"],
    }


def _show_suites(suites: Iterable[PublishedSuite]) -> None:
    from rich.table import Column, Table

    from mergekit_vision.support.console import console

    table = Table(Column("suite", no_wrap=True), "tasks", "experts", "license", "train images", "test images")
    for suite in suites:
        need, license_ = needs(suite), suite.experts_license or "not stated"
        images = (f"{need['images'][split]:,}" for split in ("train", "test"))
        table.add_row(suite.name, str(len(suite.tasks)), f"{need['experts_gb']} GB", license_, *images)
    console.print(table)
    console.print("`mergekit-vision suites NAME` lists the tasks of one, with their data and its license.", markup=False)


def _show_tasks(suite: PublishedSuite) -> None:
    from rich.table import Column, Table

    from mergekit_vision.support.console import console

    table = Table(Column("task", no_wrap=True), "classes", "train", "test", "expert", Column("data", overflow="fold"))
    for task in suite.tasks.values():
        row = described(task)
        accuracy = "–" if row["accuracy"] is None else f"{row['accuracy']:.2f} %"
        images, source = (f"{task.images[split]:,}" for split in ("train", "test")), row["data"]
        table.add_row(task.name, str(row["classes"]), *images, accuracy, source.get("hub", "torchvision"))
    console.print(table)
    notes = {task.name: task.variant for task in suite.tasks.values() if task.variant}
    licenses = ", ".join(f"{task.name} {task.license}" for task in suite.tasks.values() if task.license)
    notes |= {"val": suite.validation, "expert": "the published accuracy on test" + (f"; {suite.caveat}" if suite.caveat else "")}
    notes |= {"licenses of data": f"{licenses or 'none known'}; for others see their cards"}
    for name, note in notes.items():
        console.print(f"{name}: {note}", markup=False)
