"""Checks of what was typed before the parser sees it."""

import inspect
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path

import yaml

from mergekit_vision import registry
from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import closest
from mergekit_vision.support.paths import expanded
from mergekit_vision.support.yaml_files import parse_yaml, read_yaml

_FREE = {"help", "class_path", "init_args", "dict_kwargs"}  # the parser's own words in a path
_PATHS = {"--suite", "--output", "--images", "--variants", "--config", "--model.merged"}


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
    for option, value in values.items():
        if value[:1] in ("{", "[", "&") and option not in _PATHS:
            _check_value(option, value)
    if (name := values.get("--model.merger", "")) and _is_name(name):
        registry.get(name)
    for option in values:
        if option not in known and option != "--":
            _check_part(option, known, values)


def _check_value(option: str, value: str) -> None:
    """Refuse a list or mapping with a key twice, of which the parser takes the last, or with aliases without end."""
    try:
        yaml.compose(value)
    except (yaml.YAMLError, RecursionError):
        return  # the parser says what it must be
    parse_yaml(value, option)


def method_first(arguments: Sequence[str]) -> list[str]:
    """Arguments with a method before its parameters, which the parser understands only in this order.

    >>> from mergekit_vision.cli.options import method_first
    >>> method_first(["--model.merger.rank", "8", "--model.merger=ESM", "--output", "out"])
    ['--model.merger=ESM', '--model.merger.rank', '8', '--output', 'out']
    """
    groups = _groups(arguments)
    ours = [group for group in groups if _depth(group)]
    if ours == (ordered := sorted(ours, key=_depth)):
        return list(arguments)
    last = max(index for index, group in enumerate(groups) if _depth(group))
    before = [group for group in groups[:last] if not _depth(group)]
    return list(chain(*before, *ordered, *groups[last + 1 :]))


def _groups(arguments: Sequence[str]) -> list[list[str]]:
    """Arguments, the value of each of a method's options with it."""
    groups = list[list[str]]()
    for argument in arguments:
        takes = bool(groups) and len(groups[-1]) == 1 and "=" not in groups[-1][0] and _depth(groups[-1]) > 0
        if takes and not argument.startswith("--"):
            groups[-1].append(argument)
        else:
            groups.append([argument])
    return groups


def _depth(group: Sequence[str]) -> int:
    """How deep in a method an option lies; 0 for what is no value of a method's."""
    option = group[0].partition("=")[0]
    ours = f"{option}.".startswith("--model.merger.") and not option.endswith(".help")
    return option.count(".") if ours else 0


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
        elif option == "--variants":
            found += _named_in_variants(value)
    return found


def import_mergers(names: Sequence[str]) -> None:
    """Import the classes among the names of mergers; they may lie beside the user.

    Raises:
        InputError: when one is not there, or is no merger.
    """
    path = sys.path
    sys.path = [*path, str(Path.cwd())]
    try:
        for name in names:
            if "." in name:
                registry.get(name)
    finally:
        sys.path = path


def _named_in_variants(file: str) -> Iterator[str]:
    """Names of methods in a file of variants; none where it cannot be read, which is said when it is needed."""
    try:
        for variant in read_yaml(expanded(file)):
            yield from _class_paths(variant["merger"])
    except (ValueError, KeyError, TypeError):
        return


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
    if not (name := values.get(owner, "")) and "--config" not in list(values)[: list(values).index(option)]:
        raise InputError(f"{option} is a parameter of a method; name the method too: -m NAME, or --config FILE before {option}")
    if not _is_name(name):
        return  # the method stands in a file
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
