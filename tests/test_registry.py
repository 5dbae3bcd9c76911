import sys
from abc import abstractmethod
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest

from mergekit_vision import registry
from mergekit_vision.merger import Merged, MergeInputs, Merger
from mergekit_vision.registry import RegistryError


class Mine(Merger):
    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({})


class mine(Mine):  # noqa: N801
    pass


class MINE(Mine):
    pass


class Unfinished(Merger):
    @abstractmethod
    def merge(self, inputs: MergeInputs) -> Merged: ...


@pytest.fixture
def register(monkeypatch):
    """Registers ``(name, value, distribution)`` in the place of what is installed; the classes are in ``their_methods``."""
    module = ModuleType("their_methods")
    module.__dict__.update(Mine=Mine, mine=mine, MINE=MINE, Unfinished=Unfinished, Text="a string", Other=int)
    monkeypatch.setitem(sys.modules, "their_methods", module)

    def replace(*points: tuple[str, str, str]) -> None:
        found = [EntryPoint(name, value, registry.GROUP) for name, value, _ in points]
        for point, (_, _, distribution) in zip(found, points, strict=True):
            vars(point).update(dist=SimpleNamespace(name=distribution, version="1.0"))
        monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in found if point.group == group])

    return replace


def test_the_five_methods_are_installed():
    found = registry.mergers()
    assert {"Average", "ESM", "TIES", "TSVM", "TaskArithmetic"} <= found.keys()
    assert all(issubclass(cls, Merger) and cls.__name__ == name for name, cls in found.items())
    assert list(found) == sorted(found)


def test_get_takes_a_short_name_or_a_class_path(register):
    register(("Mine", "their_methods:Mine", "theirs"))
    assert registry.get("Mine") is Mine
    assert registry.get("their_methods.MINE") is MINE
    assert registry.get("mergekit_vision.plugins.tsvm.TSVM").__name__ == "TSVM"


@pytest.mark.parametrize(("wrong", "meant"), [("TSV-M", "TSVM"), ("ties", "TIES"), ("task_arithmetic", "TaskArithmetic")])
def test_a_misspelled_name_gets_a_suggestion_and_the_list(wrong, meant):
    with pytest.raises(RegistryError, match=f"Did you mean {meant}.*Average, ESM"):
        registry.get(wrong)


def test_an_unknown_name_gets_the_list_only():
    with pytest.raises(RegistryError) as error:
        registry.get("Qqqqqqq")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("points", "messages"),
    [
        ([("Mine", "their_methods:Mine", "one"), ("Mine", "their_methods:MINE", "two")], ["of one name", "one 1.0", "two 1.0"]),
        ([("Mine", "their_methods:Mine", "one"), ("MINE", "their_methods:MINE", "two")], ["of one name", "one 1.0", "two 1.0"]),
        ([("mine", "their_methods:mine", "one")], ["CamelCase", "one 1.0"]),
        ([("My_Method", "their_methods:Mine", "one")], ["CamelCase", "one 1.0"]),
        ([("Yours", "their_methods:Mine", "one")], ["the class's name, Mine", "one 1.0"]),
        ([("Unfinished", "their_methods:Unfinished", "one")], ["abstract, merge is missing", "one 1.0"]),
        ([("Text", "their_methods:Text", "one")], ["not a subclass", "one 1.0"]),
        ([("Other", "their_methods:Other", "one")], ["not a subclass", "one 1.0"]),
    ],
)
def test_bad_registrations_are_refused_and_name_their_distribution(register, points, messages):
    register(*points)
    with pytest.raises(RegistryError) as error:
        registry.mergers()
    assert all(message in str(error.value) for message in messages)


def test_the_same_registration_twice_on_the_path_is_one(register):
    register(("Mine", "their_methods:Mine", "one"), ("Mine", "their_methods:Mine", "one"))
    assert registry.mergers() == {"Mine": Mine}


def test_a_method_that_cannot_be_imported_does_not_stop_the_others(register):
    register(("Mine", "their_methods:Mine", "one"), ("Gone", "no_such_module:Gone", "two"), ("Lost", "their_methods:Lost", "two"))
    assert registry.mergers() == {"Mine": Mine}
    assert registry.broken().keys() == {"Gone", "Lost"}
    assert isinstance(registry.broken()["Gone"], ImportError)
    with pytest.raises(RegistryError, match=r"Gone is registered but cannot be imported: ModuleNotFoundError: .*no_such_module"):
        registry.get("Gone")
    with pytest.raises(RegistryError, match="Did you mean Gone"):
        registry.get("Gonee")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module.Mine", "ModuleNotFoundError"),
        ("their_methods.Nothing", "AttributeError"),
        ("their_methods.Unfinished", "abstract"),
        ("their_methods.Text", "not a subclass"),
    ],
)
def test_class_paths_that_lead_nowhere(register, path, message):
    register()
    with pytest.raises(RegistryError, match=message):
        registry.get(path)
