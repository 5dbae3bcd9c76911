"""What the argument parser says, in plain words."""

import inspect
import re
from collections.abc import Collection
from typing import Any, NoReturn, cast

from lightning.pytorch.cli import LightningArgumentParser

from mergekit_vision import registry
from mergekit_vision.cli.short import summary
from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merger
from mergekit_vision.suites.layout import BUILTIN
from mergekit_vision.support.faults import closest

_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'list'>": "a list such as '[a, b]'",
    "<class 'tuple'>": "a list such as '[a, b]'",
    "<class 'dict'>": "a mapping such as '{a: 1}'",
}


class Parser(LightningArgumentParser):
    """An argument parser whose errors are one message, and whose help begins with the options that matter."""

    command: str | None = None
    """Of which command, for the parsers that have one."""

    def describe(self, command: str) -> None:
        """Make this the parser of a command."""
        self.command, self.usage = command, f"mergekit-vision {command} --suite SUITE.yaml [options]"
        groups = cast(list[Any], self._action_groups)
        groups.sort(key=lambda group: str(group.title).startswith("Lightning"))  # what few need comes last

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse what cannot be parsed.

        Raises:
            InputError: always.
        """
        raise InputError(explain(message, self._option_strings()))

    def _option_strings(self) -> set[str]:
        """The options of this parser and of its commands."""
        commands = self._subcommands_action.choices.values() if self._subcommands_action else ()
        return {option for parser in (self, *commands) for option in parser._option_string_actions}

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text."""
        text: str = super().format_help(*args, **kwargs)
        if self.command is None:
            return text
        start, _, rest = text.partition("\noptions:\n")
        return f"{start}\n{summary(self.command)}\n\nall options, by their full names:\n{rest}"


def explain(message: str, known: Collection[str] = ()) -> str:
    r"""The part of a jsonargparse message that helps.

    >>> from mergekit_vision.cli.messages import explain
    >>> explain("Parser key \"suite\":\n  Expected a <class 'str'>. Got value: None")
    '--suite is missing; give -s FILE, or -s demo'
    >>> explain("Parser key \"model.route\":\n  Expected a typing.Literal['router', 'base']. Got value: ruter")
    '--model.route must be one of router, base, not ruter (did you mean `router`?)'
    """
    if match := re.match(r"argument (\S+): expected one argument", message):
        return f"{match[1]} needs a value"
    if match := re.match(r"[Uu]nrecognized arguments: (.*)", message):
        return f"{match[1]}: no option of this command{_as_options(match[1].split())}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        missing = [f"--{name.rpartition('.')[2]}" for name in match[1].split(", ")]
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    key = re.search(r'(?:Parser key|Key) "([\w.]+)"', message)
    option = f"--{key[1]}" if key else ""
    if unknown := re.search(r"does not accept option '([\w.]+)'", message):
        return f"configuration: unknown option {unknown[1]}{closest(f'--{unknown[1]}', known)}"
    if key and re.search(r"Got value: None|is required", message):
        if "is required" in message:
            option = f"--{key[1].rpartition('.')[2]}"  # without the command's name, as older versions of jsonargparse give it
        return f"{option} is missing{'; give -s FILE, or -s demo' if option == '--suite' else ''}"
    if nested := re.search(r"^ +- --([\w.]+) (.*)$", message, flags=re.MULTILINE):  # a parameter of a class, explained before
        return f"{option}.{nested[1]} {nested[2]}"
    if (wrong_name := re.search(r"Option '(\w+)' is not accepted", message)) and (owner := _merger_in(message)):
        return f"{option}: {owner.__name__} takes no {wrong_name[1]}{closest(wrong_name[1], inspect.signature(owner).parameters)}"
    if wrong := _wrong_value(message):
        return f"{option} {wrong}"
    reasons = re.findall(r"^ +- (.*)$", message.partition("Given value")[0], flags=re.MULTILINE)
    reasons = [reason for reason in reasons if not re.match("Expected an? (<class 'NoneType'>|path)", reason)]
    text = "; ".join(reasons) or re.sub(r'^Parser key "[\w.]+": *', "", message).strip() or message
    return f"{option}: {text}" if option else text


def _as_options(words: list[str]) -> str:
    """Hint for a suite and a method that were given without their options."""
    suites = [f"-s {word}" for word in words if word in BUILTIN or word.endswith((".yaml", ".yml"))]
    methods = [f"-m {word}" for word in words if word in registry.mergers()]
    return f"; give {' '.join([*suites, *methods])}" if suites or methods else ""


def _merger_in(message: str) -> type[Merger] | None:
    """The merging method that a refused value names."""
    name = re.search(r"Given value: \{'class_path': '([\w.]+)'", message)
    return registry.mergers().get(name[1].rpartition(".")[2]) if name else None


def _wrong_value(message: str) -> str | None:
    """What a value must be, where that is all that is wrong with it."""
    types = re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", message, flags=re.MULTILINE)
    types = [found for found in types if found != "<class 'NoneType'>" and not found.startswith("path")]
    value = re.search(r"Got value: (.*)$", message, flags=re.MULTILINE)
    value = value or re.search(r"Given value: (?:NestedArg\(key=.*, val=')?(.*?)(?:'\))?$", message, flags=re.MULTILINE)
    if not types or not value or "Problem" in message:
        return None
    words, names = [], list[str]()
    for found in types:
        if found.startswith("typing.Literal["):
            names += re.findall(r"'([^']*)'", found)
        else:
            words.append(_TYPES.get(found, found.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]))
    if names:
        words.append(f"one of {', '.join(names)}" if len(names) > 1 else names[0])
    return f"must be {' or '.join(dict.fromkeys(words))}, not {value[1]}{closest(value[1], names)}"
