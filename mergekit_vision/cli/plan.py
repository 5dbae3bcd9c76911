"""``mergekit-vision plan``: what a run on a suite would do, read and take."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit_vision.cli.plain_parser import PlainParser, place
from mergekit_vision.suites.splits import TEST, VAL
from mergekit_vision.support.faults import raise_faults


def plan(arguments: list[str]) -> None:
    """Print what a run would do, and write it as JSON where that is asked for; nothing is downloaded.

    Args:
        arguments: of the command.

    Raises:
        InputError: for anything the user can correct; with every fault of the suite, after the plan was printed.
        SystemExit: after ``--help``.
    """
    chosen = parser().parse_args(arguments)
    from mergekit_vision.cli.options import import_mergers
    from mergekit_vision.registry import default_mergers
    from mergekit_vision.runs.checks import check_place
    from mergekit_vision.runs.planning import Options, Planning
    from mergekit_vision.suites.suite import Suite
    from mergekit_vision.support.console import console_output
    from mergekit_vision.support.hub import offline
    from mergekit_vision.support.json_files import write_json

    if chosen.output is not None:
        check_place(chosen.output)
    names = _listed(chosen.mergers)
    import_mergers(names)
    mergers = default_mergers(names)
    options = Options(chosen.proxies, chosen.batch_size, chosen.cache_mb)
    with console_output():
        with offline():
            suite = Suite.load(chosen.suite, chosen.allow_code)
        found = Planning(suite, mergers, options).content()
        _show(found)
    if chosen.output is not None:
        write_json(chosen.output / "plan.json", found)
    raise_faults(suite.path, found["faults"])


def parser() -> PlainParser:
    """The parser of the command's options."""
    made = PlainParser("plan", "Show what a run on a suite would do, read and take. Nothing is downloaded.")
    made.add_argument("-s", "--suite", required=True, metavar="FILE", help="suite file, demo, or the name of a published suite")
    made.add_argument("--mergers", default="all", metavar="LIST", help="methods: '[TIES, ESM]'; all unless given")
    made.add_argument("-o", "--output", type=place, metavar="DIR", help="directory in which plan.json is written")
    made.add_argument("--proxies", type=int, default=32, metavar="N", help="proxy images a task; 32 unless given")
    made.add_argument("--batch-size", type=int, default=128, metavar="N", help="images a batch; 128 unless given")
    made.add_argument("--cache-mb", type=int, default=2048, metavar="MIB", help="memory for decoded pixels; 2048 unless given")
    made.add_argument("--allow-code", action="store_true", help="import data set classes that the suite names: trust it first")
    return made


def _listed(mergers: str) -> list[str]:
    """The names in a list of methods, as ``compare`` reads it: YAML, or one text with commas."""
    from mergekit_vision.support.yaml_files import parse_yaml

    value = parse_yaml(mergers, "--mergers")
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [str(name).strip() for name in names]


def _show(found: Mapping[str, Any]) -> None:
    from rich.table import Column, Table

    from mergekit_vision.support.console import as_markup, console

    table = Table(
        Column("task", no_wrap=True), "classes", VAL, TEST, *(Column(head, overflow="fold") for head in ("expert", "data"))
    )
    for name, task in found["tasks"].items():
        images = (_number(task["data"][split]["images"]) if split in task["data"] else "–" for split in (VAL, TEST))
        data = dict.fromkeys(_presence(data) for data in task["data"].values())
        table.add_row(name, str(len(task["classes"])), *images, as_markup(_presence(task["expert"])), as_markup("; ".join(data)))
    console.print(table)
    if found["estimate"] is not None:
        console.print(_costs(found["estimate"]["methods"]))
    for line in _lines(found):
        console.print(line, markup=False, highlight=False)


def _costs(methods: Mapping[str, Mapping[str, float | None]]) -> Any:
    """The table of what each method takes."""
    from rich.table import Column, Table

    table = Table(Column("method", no_wrap=True), "merge", "search", "evaluation", "memory")
    for name, costs in methods.items():
        memory = "unknown" if costs["peak_bytes"] is None else size(costs["peak_bytes"])
        table.add_row(name, *(duration(costs[part]) for part in ("merge", "search", "evaluation")), memory)
    return table


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What there is to say below the tables."""
    sizes = found["bytes"]
    unknown = f", and what is not known: {', '.join(sizes['unknown'])}" if sizes["unknown"] else ""
    backbone = found["backbone"]
    yield f"backbone: {', '.join(filter(None, (backbone['name'], backbone['pretrained'])))}, {_presence(backbone)}"
    yield f"to download: {size(sizes['download'])}{unknown}"
    yield f"to store: {size(sizes['store'])}, of it {size(sizes['output'])} for a merged model"
    if found["estimate"] is not None:
        once = found["estimate"]["once"]
        parts = {"zero-shot heads": "heads", "experts on val": "experts_val", "experts on test": "experts_test"}
        yield f"once for all methods: {', '.join(f'{text} {duration(once[part])}' for text, part in parts.items())}"
    yield "times and memory are estimates for one process on this machine's CPU"


def _presence(one: Mapping[str, Any]) -> str:
    """Whether an expert or a split is here, and else where it is from."""
    if one["here"]:
        return "here"
    return str(one["place"]) + (", not here" if one["bytes"] is None else f", {size(one['bytes'])}")


def _number(images: int | None) -> str:
    return "unknown" if images is None else f"{images:,}"


def duration(seconds: float | None) -> str:
    """A time in the unit that suits it.

    >>> from mergekit_vision.cli.plan import duration
    >>> duration(0.26), duration(90), duration(20000), duration(None)
    ('0.3 s', '1.5 min', '5.6 h', 'unknown')
    """
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """So many bytes, in units of 10^6 or 10^9.

    >>> from mergekit_vision.cli.plan import size
    >>> size(350_000_000), size(2_800_000_000)
    ('350 MB', '2.8 GB')
    """
    return f"{count / 1e6:,.0f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"
