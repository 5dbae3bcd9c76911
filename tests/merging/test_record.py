"""What is written down of a merge."""

import json
from dataclasses import dataclass

from mergekit_vision.merger import Merged, MergeInputs, Merger
from mergekit_vision.merging.record import citations, merger_record
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.ties import TIES


@dataclass(frozen=True)
class Nested(Merger):
    """A method on another method, by an unknown author."""

    inner: Merger

    def merge(self, inputs: MergeInputs) -> Merged:
        return self.inner.merge(inputs)


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


def test_papers_of_a_method_and_of_those_it_builds_on_are_cited_once() -> None:
    assert citations(TIES()) == [TIES.paper]
    assert citations(ESMPP(base=TIES())) == [ESMPP.paper, TIES.paper]
    assert citations(Nested(Nested(ESMPP(base=ESMPP())))) == [ESMPP.paper]
    assert all((ESMPP.paper, TIES.paper))
