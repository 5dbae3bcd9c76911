"""``mergekit-vision fetch``: everything that a suite needs, downloaded and verified."""

import re

from mergekit_vision.cli.plain_parser import PlainParser
from mergekit_vision.errors import InputError


def fetch(arguments: list[str]) -> None:
    """Download everything that a suite needs.

    Args:
        arguments: of the command.

    Raises:
        InputError: for anything the user can correct, and at the end when something is missing.
        SystemExit: after ``--help``.
    """
    chosen = parser().parse_args(arguments)
    from mergekit_vision.runs.fetching import fetch_suite
    from mergekit_vision.suites.suite import Suite
    from mergekit_vision.support.console import console_output

    tasks = [name for word in chosen.tasks for name in re.split(r"[\[\],\s]+", word) if name]
    if chosen.tasks and not tasks:
        raise InputError("fetch: --tasks names none; leave it out to fetch what all tasks need")
    with console_output():
        fetch_suite(Suite.load(chosen.suite, chosen.allow_code), tasks)


def parser() -> PlainParser:
    """The parser of the command's options."""
    parser = PlainParser("fetch", "Download and verify everything that a suite needs; afterwards it runs with HF_HUB_OFFLINE=1.")
    parser.add_argument("-s", "--suite", required=True, metavar="SUITE", help="suite file, or the name of a published suite")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="only the experts and data of these tasks")
    parser.add_argument("--allow-code", action="store_true", help="import data set classes that no installed package registers")
    return parser
