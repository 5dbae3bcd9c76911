"""Messages of the argument parser in plain words."""

import re
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from mergekit_vision import registry
from mergekit_vision.errors import InputError


class Parser(LightningArgumentParser):
    """An argument parser whose errors are one message and not the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse what cannot be parsed.

        Raises:
            InputError: always.
        """
        raise InputError(explain(message))


def explain(message: str) -> str:
    r"""The part of a jsonargparse message that helps.

    >>> explain("Parser key \"suite\":\n  Expected a <class 'str'>. Got value: None")
    '--suite is missing'
    """
    key = re.search(r'(?:Parser key|Key) "([\w.]+)"', message)
    option = f"--{key[1]}" if key else ""
    if key and re.search(r"Got value: None|is required", message):
        return f"{option} is missing"
    reasons = re.findall(r"^ +- (.*)$", message.partition("Given value")[0], flags=re.MULTILINE)
    reasons = [reason for reason in reasons if "NoneType" not in reason and "Expected a path" not in reason]
    text = "; ".join(reasons) or message.partition(":\n")[2].strip() or message
    return f"{option}: {text}" if option else text


def _check_merger(arguments: list[str]) -> None:
    """Name the methods there are before the parser says less about a misspelled one."""
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name = value if argument == "--model.merger" else argument.removeprefix("--model.merger=")
        if name != argument and re.fullmatch(r"\w+(\.\w+)*", name) and not name.endswith((".yaml", ".yml", ".json")):
            registry.get(name)
