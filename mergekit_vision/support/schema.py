"""Schemas of files: what is wrong with a file's content, in words of the file."""

import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from mergekit_vision.support.faults import closest
from mergekit_vision.support.paths import expanded


class _Short(reprlib.Repr):
    """Looks neither deep nor far into a value, whose whole ``repr`` may be endless."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2

    def repr_int(self, x: int, level: int) -> str:
        """A number; Python itself refuses to write one of thousands of digits."""
        return repr(x) if x.bit_length() < 128 else "of very many digits"


_KINDS = {
    "string_type": "text",
    "string_too_short": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "too_short": "at least one entry long",
}
"""Pydantic's kind of error -> what the value had to be."""

_REPR = _Short()


def _usable(path: object) -> str:
    if not isinstance(path, str) or not path:
        raise ValueError(f"must be text, not {shown(path)}")
    expanded(path)
    return path


Text = Annotated[str, Field(min_length=1)]
"""Text that is not empty."""

# pydantic's own text has no bytes that are no UTF-8, which names may have
FilePath = Annotated[str, PlainValidator(_usable), WithJsonSchema({"type": "string", "minLength": 1})]
"""Text that can be a path, if not of anything there is."""

_OWN_WORDS = {"value_error", "fault"}  # raised by a validator of ours; said by a schema further in
_KEY = "[key]"  # what pydantic puts behind a mapping's key that is wrong itself


class Schema(BaseModel):
    """A mapping with known keys, whose values are neither converted nor changed; NaN and infinity are refused.

    A field's description says what its value must be, as in "must be a list of texts". Validators raise a ``ValueError`` with
    the whole text of the fault, but for its place.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _in_words(cls, content: Any, handler: "ModelWrapValidatorHandler[Schema]") -> "Schema":
        """Say what is wrong while it is known which schema's keys are meant."""
        try:
            return handler(content)
        except ValidationError as error:
            details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
            raise ValidationError.from_exception_data(cls.__name__, [cls._fault(detail) for detail in details]) from None

    @classmethod
    def _fault(cls, detail: ErrorDetails) -> InitErrorDetails:
        place, kind, fields = detail["loc"], detail["type"], cls.model_fields
        key = str(place[0]) if place else ""
        if kind == "extra_forbidden" and len(place) == 1:
            place, text = (), f"unknown key `{_cut(key)}`{closest(key, fields) or '; known are ' + ', '.join(fields)}"
        elif kind == "missing" and len(place) == 1:
            place, text = (), f"`{key}` is missing"
        elif kind == "model_type" and not place:
            required = [name for name, field in fields.items() if field.is_required()]
            text = f"must be a mapping with the keys {', '.join(required or fields)}, not {shown(detail['input'])}"
        else:
            text = _said(detail, fields[key].description if len(place) == 1 and key in fields else None)
        return InitErrorDetails(type=PydanticCustomError("fault", "{text}", {"text": text}), loc=place, input=detail["input"])


def faults(schema: Any, content: object, place: str = "") -> list[str]:
    """What is wrong with a file's content: one text a fault, in the order of the file.

    Args:
        schema: a :class:`Schema`, or any other type that pydantic can check.
        content: of the file, as plain values.
        place: what to call the content as a whole, such as ``"the file"``; not named where empty.

    >>> from mergekit_vision.support.schema import Schema, faults
    >>> class Point(Schema):
    ...     x: float
    ...     name: str = ""
    >>> faults(dict[str, Point], {"a": {"x": 1.0, "nme": "a"}, "b": {"x": "left"}})
    ['a: unknown key `nme` (did you mean `name`?)', "b.x: must be a number, not the str 'left'"]
    """
    try:
        TypeAdapter(schema).validate_python(content, strict=True)
    except ValidationError as error:
        found = _Content(content)
        return _alternatives(found.line(detail, place) for detail in sorted(error.errors(), key=found.order))
    return []


def _alternatives(lines: Iterable[str]) -> list[str]:
    """One text where a value is none of several kinds that it could be."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        start, must, rest = line.partition("must be ")
        kind, no, value = rest.rpartition(", not ")
        found = kinds.setdefault((start + must, no + value) if no else (line, ""), [])
        if (kind := kind if no else "") not in found:
            found.append(kind)
    return [f"{start}{' or '.join(found)}{value}" for (start, value), found in kinds.items()]


def shown(value: object) -> str:
    """A value in a message: its kind and as much of it as fits.

    >>> from mergekit_vision.support.schema import shown
    >>> shown(None), shown(3), shown(["a"] * 9)
    ('empty', 'the int 3', "the list ['a', 'a', 'a', 'a', 'a', 'a', ...]")
    """
    return "empty" if value is None else f"the {type(value).__name__} {brief(value)}"


def brief(value: object) -> str:
    """As much of a value's ``repr`` as fits into a message."""
    return _cut(_REPR.repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"


def _said(detail: ErrorDetails, described: str | None = None) -> str:
    """The text of a fault without its place."""
    if detail["type"] in _OWN_WORDS:
        return detail["msg"].removeprefix("Value error, ")
    if detail["loc"][-1:] == (_KEY,):
        return f"key {brief(detail['input'])} must be {_KINDS.get(detail['type'], 'another')}"
    must = described or _KINDS.get(detail["type"])
    text = f"must be {must}" if must else detail["msg"].replace("Input should be", "must be").replace("Input should", "must")
    return f"{text}, not {shown(detail['input'])}"


class _Content:
    """The content of a file, in which places of pydantic's errors are looked up."""

    def __init__(self, whole: object) -> None:
        self._whole = whole
        self._indexes: dict[int, dict[str, tuple[int, object]]] = {}

    def line(self, detail: ErrorDetails, whole: str) -> str:
        """One fault with its place: the path of keys, then the number of a list's entry."""
        place = detail["loc"][:-2] if detail["loc"][-1:] == (_KEY,) else detail["loc"]
        path, entry = [], ""
        for key, _, listed in self._steps(place, detail["type"]):
            if listed:
                entry = f"entry {key} "
            else:
                path.append(str(key))
        where = ".".join(path) or whole
        return f"{where}: {entry}{_said(detail)}" if where else f"{entry}{_said(detail)}"

    def order(self, detail: ErrorDetails) -> tuple[int, ...]:
        """Where the keys of a fault's path stand in the file, level by level, to sort by."""
        return tuple(position for _, position, _ in self._steps(detail["loc"], detail["type"]))

    def _steps(self, place: Iterable[int | str], kind: str) -> Iterator[tuple[int | str, int, bool]]:
        """Each key of a fault's path with its position, and whether it is the number of a list's entry."""
        part = self._whole
        for key in place:
            listed = isinstance(part, list | tuple)
            position, within = self._found(part, key)
            if position < 0 and kind != "missing":
                continue  # nothing lies there: pydantic names one of several kinds that the value could be
            part = within
            yield key, position, listed

    def _found(self, part: object, key: int | str) -> tuple[int, object]:
        if isinstance(part, Mapping):
            if id(part) not in self._indexes:  # there can be as many faults as keys
                names = enumerate(part.items())
                self._indexes[id(part)] = {str(name): (position, value) for position, (name, value) in names}
            return self._indexes[id(part)].get(str(key), (-1, None))
        if isinstance(part, list | tuple) and isinstance(key, int) and key < len(part):
            return key, part[key]
        return -1, None
