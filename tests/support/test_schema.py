"""Schemas: each fault is named with its place, in plain words."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field, ValidationError

from mergekit_vision.support.schema import Schema, faults, shown


def even(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} is odd")
    return value


class Inner(Schema):
    size: Annotated[int, AfterValidator(even)]
    kind: Literal["a", "b"] = "a"


class Outer(Schema):
    share: float = Field(ge=0, le=1)
    inner: dict[str, Inner] = Field(default={}, description="a mapping of names to inner things")
    words: list[str] = Field(default=[])
    rank: int | Literal["all"] | None = None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"share": 1}, []),
        ({"share": 0.5, "inner": {"x": {"size": 2, "kind": "b"}}, "words": ["y"]}, []),
        (None, ["it: must be a mapping with the keys share, not empty"]),
        ({}, ["it: `share` is missing"]),
        ({"shar": 1}, ["it: unknown key `shar` (did you mean `share`?)", "it: `share` is missing"]),
        ({"share": 1, "zzz": 1}, ["it: unknown key `zzz`; known are share, inner, words, rank"]),
        ({"share": 1, "rank": "al"}, ["rank: must be a whole number or 'all', not the str 'al'"]),
        ({"share": True}, ["share: must be a number, not the bool True"]),
        ({"share": float("nan")}, ["share: must be a finite number, not the float nan"]),
        ({"share": -1.5}, ["share: must be greater than or equal to 0, not the float -1.5"]),
        ({"share": 0, "inner": [1]}, ["inner: must be a mapping of names to inner things, not the list [1]"]),
        ({"share": 0, "inner": {"x": {"size": 3}}}, ["inner.x.size: 3 is odd"]),
        ({"share": 0, "inner": {"x": {"size": 2.0}}}, ["inner.x.size: must be a whole number, not the float 2.0"]),
        ({"share": 0, "inner": {"x": {"size": 2, "kind": "c"}}}, ["inner.x.kind: must be 'a' or 'b', not the str 'c'"]),
        ({"share": 0, "words": ["y", 2]}, ["words: entry 1 must be text, not the int 2"]),
        ({"words": "y", "share": "x"}, ["words: must be a list, not the str 'y'", "share: must be a number, not the str 'x'"]),
    ],
)
def test_faults_name_the_place_and_what_was_found(content: Any, expected: list[str]) -> None:
    assert faults(Outer, content, "it") == expected
    if expected:
        with pytest.raises(ValidationError):
            Outer.model_validate(content)


def test_a_fault_of_the_whole_needs_no_name() -> None:
    assert faults(Inner, {}) == ["`size` is missing"]


def test_braces_in_a_text_stay() -> None:
    assert faults(Inner, {"size": 2, "{x}": 1}) == ["unknown key `{x}`; known are size, kind"]


def test_what_is_shown_of_a_value_is_short_whatever_the_value() -> None:
    deep: list[Any] = []
    deep.append(deep)
    wide: list[Any] = ["lol"] * 10
    for _ in range(12):
        wide = [wide] * 10
    for value in (deep, wide, "x" * 10**6, 10**6000, {"a": wide}):
        assert len(shown(value)) < 60
