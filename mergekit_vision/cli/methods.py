"""``mergekit-vision methods``: what is installed."""

import json
from collections.abc import Iterable

from mergekit_vision.cli.plain_parser import PlainParser
from mergekit_vision.registry import Method, broken, methods


def list_methods(arguments: list[str]) -> None:
    """Print the installed merging methods.

    Args:
        arguments: of the command.

    Raises:
        InputError: for an unknown option.
        SystemExit: after ``--help``.
    """
    parser = PlainParser("methods", "List the installed merging methods.")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON list of objects: name, title, paper, needs, kind")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table, with what each does")
    chosen = parser.parse_args(arguments)
    if chosen.json:
        keys = ("name", "title", "paper", "needs", "kind")
        print(json.dumps([{key: getattr(method, key) for key in keys} for method in methods()], indent=2, ensure_ascii=False))
    elif chosen.markdown:
        print(markdown_table(methods()))
    else:
        _show(methods())


def markdown_table(listed: Iterable[Method], papers: bool = True) -> str:
    """The methods as a Markdown table, one line a method; with or without a column of their papers."""
    heads = ["name", "model", "needs", "what it does", *(["paper"] if papers else [])]
    rows = [heads, ["---"] * len(heads)]
    for method in listed:
        needs = method.needs.replace("none", "–")
        rows.append([f"`{method.name}`", method.kind, needs, method.summary, *([method.paper or "–"] if papers else [])])
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def _show(listed: Iterable[Method]) -> None:
    from rich.table import Table

    from mergekit_vision.support.console import as_markup, console

    table = Table("name", "title", "model", "needs", "paper")
    for method in listed:
        table.add_row(method.name, as_markup(method.title), method.kind, method.needs, as_markup(method.paper or "–"))
    console.print(table)
    for name, error in broken().items():
        console.print(f"{name} cannot be imported: {type(error).__name__}: {error}", markup=False)
