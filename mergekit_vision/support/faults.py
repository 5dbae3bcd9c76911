"""Several faults in one message, and hints at what was meant."""

import difflib
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from mergekit_vision.errors import InputError

_LISTED = 20


def closest(word: str, known: Collection[str]) -> str:
    """Hint for a misspelled word: ``" (did you mean `parquet`?)"``, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean `{near[0]}`?)" if near else ""


def repeated(names: Iterable[str]) -> list[str]:
    """The names that stand in a list more than once, each once.

    >>> from mergekit_vision.support.faults import repeated
    >>> repeated(["a", "b", "a"])
    ['a']
    """
    return [name for name, count in Counter(names).items() if count > 1]


def closest_file(path: Path) -> str:
    """The same hint for a missing file, at the other files of its directory."""
    try:
        return closest(path.name, [other.name for other in path.parent.iterdir() if other.is_file()])
    except OSError:  # no such directory, or not readable: no hint
        return ""


def in_one_line(error: BaseException) -> str:
    r"""What a library's error says, or its class where it says nothing.

    >>> from mergekit_vision.support.faults import in_one_line
    >>> in_one_line(OSError("broken\n  data stream")), in_one_line(MemoryError())
    ('broken data stream', 'MemoryError')
    """
    return " ".join(str(error).split()) or type(error).__name__


def raise_faults(path: Path, faults: list[str], of: str | None = None, brief: bool = False) -> None:
    """Raise one :class:`~mergekit_vision.errors.InputError` that lists a file's faults, if any: twenty, and how many more.

    With ``brief``, a single fault stands on the line of the file.
    """
    if brief and len(faults) == 1:
        raise InputError(f"{path}: {faults[0]}", of)
    if faults:
        more = [f"… and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        head = f"{path}: {len(faults)} {'fault' if len(faults) == 1 else 'faults'}"
        raise InputError("\n  ".join([head, *faults[:_LISTED], *more]), of)
