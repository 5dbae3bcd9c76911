"""How the reading of a damaged file ends."""

from collections.abc import Callable
from typing import TypeVar

from mergekit_vision.errors import InputError

Result = TypeVar("Result")


def outcome(function: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What a function returns, or the message of its ``InputError``; any other error is a fault of the test's subject."""
    try:
        return function(), None
    except InputError as error:
        return None, str(error)
