"""Short names of the options that matter, and checks of what was typed before the parser sees it."""

import inspect
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mergekit_vision import registry
from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import closest
from mergekit_vision.support.yaml_files import read_yaml


class Short(NamedTuple):
    """A short name of an option.

    Attributes:
        names: the short names, one of them with two dashes.
        full: the option they stand for; parts of it may follow either name, as in ``--merger.rank``.
        value: placeholder of its value.
        text: what it does.
        commands: that have it; all where empty.
        alone: the value that the short name stands for without one.
    """

    names: tuple[str, ...]
    full: str
    value: str
    text: str
    commands: tuple[str, ...] = ()
    alone: str = ""


_MERGING = ("merge", "validate", "test", "predict")

SHORT = (
    Short(("-s", "--suite"), "--suite", "FILE", "suite: backbone, tasks and experts; `demo` comes with the package"),
    Short(("-m", "--merger"), "--model.merger", "NAME", "merging method; --merger.rank 8 sets its parameter rank", _MERGING),
    Short(("--merged",), "--model.merged", "DIR", "a model merged before, instead of --merger", _MERGING[1:]),
    Short(("--mergers",), "--mergers", "LIST", "methods to compare: '[TIES, ESM]'; all unless given", ("compare",)),
    Short(("--task",), "--task", "NAME", "task whose classes are predicted", ("predict",)),
    Short(("--images",), "--images", "PATH", "directory of images, or one image", ("predict",)),
    Short(("--scale",), "--model.scale", "VALUE", "coefficient: a number, merger (the method's own), search or agreement"),
    Short(("--experts",), "--model.experts", "LIST", "merge the experts of these tasks only: '[mnist, gtsrb]'"),
    Short(("--route",), "--model.route", "RULE", "dynamic models: router, oracle (the true task's expert) or base"),
    Short(("--proxies",), "--data.proxies.n", "N", "unlabeled proxy images a task; --proxies.split and others set the rest"),
    Short(("--tasks",), "--data.tasks", "LIST", "evaluate these tasks only", ("validate", "test", "compare")),
    Short(("--devices",), "--trainer.devices", "N", "processes of a machine, one a device"),
    Short(("--precision",), "--trainer.precision", "KIND", "of evaluation: 32-true, bf16-mixed or 16-mixed"),
    Short(
        ("--allow-code",),
        "--data.allow_code",
        "",
        "import classes that a suite or a merged model names: trust it first",
        alone="true",
    ),
    Short(("--no-verify",), "--model.verify", "", "use a merged model whose files were changed", _MERGING[1:], "false"),
    Short(("-o", "--output"), "--output", "DIR", "directory of everything that is written; runs/latest unless given"),
)

_PARTS = {"--data.proxies.n": "--data.proxies"}  # what parts follow: --proxies.split is --data.proxies.split
_FREE = {"help", "class_path", "init_args", "dict_kwargs"}  # the parser's own words in a path


def expanded(arguments: Sequence[str]) -> list[str]:
    """Arguments with short names written out.

    >>> from mergekit_vision.cli.options import expanded
    >>> expanded(["-m", "ESM", "--merger.rank=8", "--proxies.split", "train"])
    ['--model.merger', 'ESM', '--model.merger.rank=8', '--data.proxies.split', 'train']
    """
    known = {name: short for short in SHORT for name in short.names}
    return [_expanded(argument, known, following) for argument, following in pairwise([*arguments, ""])]


def _expanded(argument: str, known: Mapping[str, Short], following: str) -> str:
    word, equals, value = argument.partition("=")
    name, dot, parts = word.partition(".")
    if name not in known:
        return argument
    full, alone = known[name].full, known[name].alone
    if alone and not dot and not equals and (alone == "false" or following not in ("true", "false")):
        return f"{full}={alone}"
    return f"{_PARTS.get(full, full)}.{parts}{equals}{value}" if dot else f"{full}{equals}{value}"


def summary(command: str) -> str:
    """The options that matter to a command, a line each."""
    lines = []
    for short in SHORT:
        if not short.commands or command in short.commands:
            names = ", ".join(short.names) if len(short.names) > 1 else f"    {short.names[0]}"
            lines.append(f"  {f'{names} {short.value}':<22}{short.text}")
    return "\n".join(["options that matter:", *lines])


def check_options(arguments: Sequence[str], known: Collection[str]) -> None:
    """Refuse options that do not exist, methods that are not installed, each with the nearest right name, and hostile files.

    Args:
        arguments: of the command, with full names.
        known: the option strings of its parser.

    Raises:
        InputError: for the first that is wrong.
    """
    for config in (value for option, value in _pairs(arguments) if option == "--config"):
        if os.path.lexists(config):
            read_yaml(Path(config))
    values = dict(_pairs(arguments))
    if (name := values.get("--model.merger", "")) and _is_name(name):
        registry.get(name)
    for option in values:
        if option not in known and option != "--":
            _check_part(option, known, values)


def merger_names(arguments: Sequence[str]) -> list[str]:
    """Names and class paths of the mergers that a command line and its configuration files give, bases included.

    >>> from mergekit_vision.cli.options import merger_names
    >>> merger_names(["--model.merger", "mine.Half", "--model.merger.base=TIES", "--model.merger.rank", "4"])
    ['mine.Half', 'TIES']
    """
    found = []
    for option, value in _pairs(arguments):
        if (
            option.startswith("--model.merger")
            and option.rpartition(".")[2] in ("merger", "base", "class_path")
            and _is_name(value)
        ):
            found.append(value)
        elif option == "--mergers":
            found += re.findall(r"[\w.]+", value)
        elif option == "--config":
            found += _named_in(value)
    return found


def _named_in(config: str) -> Iterator[str]:
    """Class paths under ``model.merger`` of a configuration file; none where it cannot be read, which the parser says."""
    try:
        yield from _class_paths(read_yaml(Path(config))["model"]["merger"])
    except (ValueError, KeyError, TypeError):
        return


def _class_paths(content: object) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            if key == "class_path" or isinstance(value, Mapping):
                yield from _class_paths(value)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options with their values, as they were typed."""
    for argument, following in pairwise([*arguments, ""]):
        if argument == "-c":
            yield "--config", following
        elif argument.startswith("--"):
            option, equals, value = argument.partition("=")
            yield option, value if equals else following


def _check_part(option: str, known: Collection[str], values: Mapping[str, str]) -> None:
    """Check an option that the parser knows only by its beginning: a parameter of a class that was named before."""
    owner, _, part = option.rpartition(".")
    while owner and owner not in known and owner not in values:
        owner, _, before = owner.rpartition(".")
        part = f"{before}.{part}"
    first = part.partition(".")[0]
    if not owner:
        raise InputError(f"unknown option {option}{closest(option, known)}")
    if _FREE & set(part.split(".")):
        return
    if not owner.startswith("--model.merger"):
        if not any(name.startswith(f"{owner}.") for name in known if not name.endswith(".help")):
            return  # a parameter of one of Lightning's own classes
        parts = {name.removeprefix(f"{owner}.") for name in known if name.startswith(f"{owner}.")}
        raise InputError(f"unknown option {option}{_closest_part(part, owner, parts)}")
    if not _is_name(name := values.get(owner, "")):
        return  # the method stands in a configuration file
    merger = registry.get(name)
    parameters = list(inspect.signature(merger).parameters)
    if first not in parameters:
        takes = f"takes {', '.join(parameters)}" if parameters else "takes no parameters"
        raise InputError(f"unknown option {option}{_closest_part(first, owner, parameters)}; {merger.__name__} {takes}")
    if not values.get(option) or values[option].startswith("--"):
        raise InputError(f"{option} needs a value")


def _closest_part(part: str, owner: str, known: Collection[str]) -> str:
    """Hint for a misspelled last part of an option; what all of them begin with would make any of them look near."""
    return closest(part, known).replace("`", f"`{owner}.", 1)


def _is_name(value: str) -> bool:
    """Whether a value names a class, and is no file or mapping."""
    return value.replace(".", "").isidentifier() and not value.endswith((".yaml", ".yml", ".json"))
