"""What is written down of a merge."""

import json
import logging
from dataclasses import dataclass

import pytest

from mergekit_vision.merger import Merged, MergeInputs, Merger
from mergekit_vision.merging.record import citations, composed, merger_record, parameter_fault
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.ties import TIES


@dataclass(frozen=True)
class Nested(Merger):
    """A method on another method, by an unknown author."""

    inner: Merger

    def merge(self, inputs: MergeInputs) -> Merged:
        return self.inner.merge(inputs)


@dataclass(frozen=True, slots=True)
class Slotted(Merger):
    """Has no dictionary."""

    inner: Merger
    gain: float = 1.0

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({})


class Exposed(Merger):
    """Shows its parameter as a property."""

    def __init__(self, gain: float = 1.0) -> None:
        self._gain = gain

    @property
    def gain(self) -> float:
        return self._gain

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({})


class Hidden(Merger):
    """Keeps its parameter under another name; that of the class is the same for all."""

    gain = 1.0

    def __init__(self, gain: float = 1.0) -> None:
        self._gain = gain

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({})


class Handed(Exposed):
    """Hands its parameters on."""

    def __init__(self, **parameters: float) -> None:
        super().__init__(**parameters)
        self.power = 2.0


def test_a_method_is_its_class_and_its_parameters() -> None:
    record = merger_record(Nested(TIES(density=0.3)))
    assert record["name"] == "Nested"
    assert record["class_path"] == f"{__name__}.Nested"
    assert list(record["init_args"]) == ["inner"]
    inner = record["init_args"]["inner"]
    assert inner["class_path"] == "mergekit_vision.plugins.ties.TIES"
    assert inner["init_args"]["density"] == 0.3
    assert json.loads(json.dumps(record)) == record


def test_what_a_method_keeps_to_itself_is_no_parameter() -> None:
    merger = TIES()
    object.__setattr__(merger, "_seen", 3)
    assert merger_record(merger) == merger_record(TIES())


def test_parameters_are_what_the_constructor_takes_wherever_they_are_kept() -> None:
    record = merger_record(Slotted(TIES(), gain=3.0))
    assert record["recipe"] == "Slotted(TIES)"
    assert record["init_args"] == {"inner": merger_record(TIES()), "gain": 3.0}
    assert [type(part) for part in composed(Slotted(Nested(TIES())))] == [Slotted, Nested, TIES]
    assert citations(Slotted(TIES())) == [TIES.paper]
    assert merger_record(Exposed(2.0))["init_args"] == {"gain": 2.0}
    assert parameter_fault(Slotted(Exposed())) is None


def test_parameters_that_cannot_be_told_are_a_warning_to_the_author(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mergekit_vision"):
        records = [merger_record(merger) for merger in (Hidden(2.0), Nested(Hidden(3.0)), Handed(gain=2.0))]
    hidden, handed = caplog.messages
    assert "Hidden does not keep what it was given as gain; its constructor must set self.gain" in hidden
    assert "Handed takes * or ** in its constructor" in handed
    assert [record["init_args"] for record in (records[0], records[2])] == [{}, {"power": 2.0}]


def test_papers_of_a_method_and_of_those_it_builds_on_are_cited_once() -> None:
    assert citations(TIES()) == [TIES.paper]
    assert citations(ESMPP(base=TIES())) == [ESMPP.paper, TIES.paper]
    assert citations(Nested(Nested(ESMPP(base=ESMPP())))) == [ESMPP.paper]
    assert all((ESMPP.paper, TIES.paper))
