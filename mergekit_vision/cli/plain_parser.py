"""The parser of commands that run no trainer."""

import argparse
from pathlib import Path
from typing import NoReturn

from mergekit_vision.errors import InputError
from mergekit_vision.support.paths import expanded


class PlainParser(argparse.ArgumentParser):
    """Parses the arguments of one command; a mistake is one line.

    Args:
        command: its name.
        description: what it does.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"mergekit-vision {command}", description=description, allow_abbrev=False)
        self.command = command

    def error(self, message: str) -> NoReturn:
        """Refuse what cannot be parsed.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self.command}: {message}")


def place(text: str) -> Path:
    """The path that an option names; no shell expands ``~`` in ``--output=~/x``.

    Raises:
        ArgumentTypeError: where it is empty, which would be the working directory, or can be no path.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or directory")
    try:
        return expanded(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
