"""What a check of an installation or a machine found, in one line each."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mergekit_vision.support.faults import in_one_line


@dataclass(frozen=True)
class Verdict:
    """The result of one check.

    Attributes:
        level: ``warning`` where everything works, but not as well as it could; ``fault`` where something does not work.
        subject: what was looked at, in a word.
        text: what was found, and the remedy where one is needed.

    >>> print(Verdict("warning", "disk", "1.2 GB free"))
    warning  disk: 1.2 GB free
    """

    level: Literal["ok", "warning", "fault"]
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<7}  {self.subject}: {self.text}"


def verdicts(subject: str, check: Callable[[], Iterable[Verdict]], remedy: str = "") -> Iterator[Verdict]:
    """What a check finds; an error in it, of whatever kind, is a fault too.

    Args:
        subject: of the verdict on an error.
        check: gives its verdicts.
        remedy: against an error.
    """
    try:
        yield from check()
    except Exception as error:  # a broken library may raise anything
        yield Verdict("fault", subject, f"{type(error).__name__}: {in_one_line(error):.500}" + (f"; {remedy}" if remedy else ""))
