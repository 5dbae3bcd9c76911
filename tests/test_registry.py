import sys
from abc import abstractmethod
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest

from mergekit_vision import registry
from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, MergeInputs, Merger
from mergekit_vision.registry import RegistryError

Register = Callable[..., None]


class Mine(Merger):
    """My own method."""

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({})


class mine(Mine):  # noqa: N801
    pass


class MINE(Mine):
    pass


class Described(Mine):
    """First sentence.

    More text.
    """

    title, paper, needs, kind = "My Method", "Me, 2026", "proxies", "dynamic"


class Demanding(Mine):
    def __init__(self, gain: float, *rest: float, **more: float) -> None:
        self.gain = gain


class Picky(Mine):
    def __init__(self, gain: float = 0.0) -> None:
        if not gain:
            raise ValueError("gain is 0")


class Unfinished(Merger):
    @abstractmethod
    def merge(self, inputs: MergeInputs) -> Merged: ...


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Registers ``(name, value, distribution)`` in the place of what is installed; the classes are in ``their_methods``."""
    module = ModuleType("their_methods")
    module.__dict__.update(
        Mine=Mine,
        mine=mine,
        MINE=MINE,
        Unfinished=Unfinished,
        Described=Described,
        Demanding=Demanding,
        Picky=Picky,
        Text="a string",
        Other=int,
    )
    monkeypatch.setitem(sys.modules, "their_methods", module)

    def replace(*points: tuple[str, str, str]) -> None:
        found = [EntryPoint(name, value, registry.GROUP) for name, value, _ in points]
        for point, (_, _, distribution) in zip(found, points, strict=True):
            vars(point).update(dist=SimpleNamespace(name=distribution, version="1.0"))
        monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in found if point.group == group])

    return replace


def test_the_methods_are_installed() -> None:
    found = registry.mergers()
    assert {"Average", "ESM", "ESMPP", "ESMPPBayes", "SMILE", "TIES", "TSVM", "TaskArithmetic"} <= found.keys()
    assert all(issubclass(cls, Merger) and cls.__name__ == name for name, cls in found.items())
    assert list(found) == sorted(found)


def test_get_takes_a_short_name_or_a_class_path(register: Register) -> None:
    register(("Mine", "their_methods:Mine", "theirs"))
    assert registry.get("Mine") is Mine
    assert registry.get("their_methods.MINE") is MINE
    assert registry.get("mergekit_vision.plugins.tsvm.TSVM").__name__ == "TSVM"


@pytest.mark.parametrize(("wrong", "meant"), [("TSV-M", "TSVM"), ("ties", "TIES"), ("task_arithmetic", "TaskArithmetic")])
def test_a_misspelled_name_gets_a_suggestion_and_the_list(wrong: str, meant: str) -> None:
    with pytest.raises(RegistryError, match=f"Did you mean {meant}.*Average, .*ESM"):
        registry.get(wrong)


def test_an_unknown_name_gets_the_list_only() -> None:
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
def test_bad_registrations_are_refused_and_name_their_distribution(
    register: Register, points: list[tuple[str, str, str]], messages: list[str]
) -> None:
    register(*points)
    with pytest.raises(RegistryError) as error:
        registry.mergers()
    assert all(message in str(error.value) for message in messages)


def test_the_same_registration_twice_on_the_path_is_one(register: Register) -> None:
    register(("Mine", "their_methods:Mine", "one"), ("Mine", "their_methods:Mine", "one"))
    assert registry.mergers() == {"Mine": Mine}


def test_a_method_that_cannot_be_imported_does_not_stop_the_others(register: Register) -> None:
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
def test_class_paths_that_lead_nowhere(register: Register, path: str, message: str) -> None:
    register()
    with pytest.raises(RegistryError, match=message):
        registry.get(path)


def test_methods_are_described_by_their_own_classes(register: Register) -> None:
    register(
        ("Mine", "their_methods:Mine", "one"), ("Described", "their_methods:Described", "two"), ("Gone", "no_such:Gone", "x")
    )
    mine, described = registry.methods()
    assert described == registry.Method("Described", "My Method", "Me, 2026", "proxies", "dynamic", "First sentence")
    assert mine == registry.Method("Mine", "Mine", "", "none", "static", "My own method")


def test_every_installed_method_says_what_it_is() -> None:
    found = {method.name: method for method in registry.methods()}
    assert found.keys() == registry.mergers().keys()
    kinds = [method.kind for method in found.values()]
    assert kinds == sorted(kinds, key=["static", "dynamic", "oracle"].index)
    ours = {
        name: method for name, method in found.items() if registry.get(name).__module__.startswith("mergekit_vision.plugins.")
    }
    assert {name for name, method in ours.items() if method.needs == "proxies"} == {
        "ESM",
        "ESMPP",
        "ESMPPBayes",
        "ESMPPFit",
        "FeatCal",
        "FisherFit",
        "RegMean",
    }
    assert {name for name, method in ours.items() if method.kind == "dynamic"} == {"ESMPP", "ESMPPBayes", "ESMPPFit", "SMILE"}
    for method in found.values():
        assert method.title
        assert method.summary
        assert not method.summary.endswith(".")
    assert len({method.title for method in found.values()}) == len(found)


def test_methods_to_compare_have_their_defaults(register: Register) -> None:
    register(("Mine", "their_methods:Mine", "one"), ("Described", "their_methods:Described", "two"))
    assert {name: type(merger) for name, merger in registry.default_mergers("all").items()} == {
        "Described": Described,
        "Mine": Mine,
    }
    for chosen in ("Mine, Described", "Mine,Described,", ["Mine", "Described", "Mine"], ("Mine", "Described")):
        assert list(registry.default_mergers(chosen)) == ["Mine", "Described"]
    assert list(registry.default_mergers(["their_methods.MINE", "Mine"])) == ["MINE", "Mine"]
    twice = registry.default_mergers(["their_methods.Mine", "Mine"])
    assert list(twice) == ["their_methods.Mine", "Mine"], "two of one name are told apart"


def test_of_all_methods_those_that_cannot_be_made_are_left_out(register: Register, caplog: pytest.LogCaptureFixture) -> None:
    register(
        ("Mine", "their_methods:Mine", "one"),
        ("Gone", "no_such_module:Gone", "two"),
        ("Demanding", "their_methods:Demanding", "two"),
    )
    with caplog.at_level("INFO", logger="mergekit_vision"):
        assert list(registry.default_mergers(["all"])) == ["Mine"]
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == ["Gone is left out", "Demanding is left out"]
    assert "it has no default for gain" in caplog.text


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("", "`mergers`: name at least one method, or give all"),
        ([], "name at least one"),
        (" , ", "name at least one"),
        ("Demanding", "`mergers` Demanding: has no default for gain, and is compared with its defaults only"),
        ("Picky", "`mergers` Picky: gain is 0"),
        ("Mien", "Did you mean Mine"),
    ],
)
def test_methods_that_cannot_be_compared(register: Register, chosen: str | list[str], message: str) -> None:
    register(*((name, f"their_methods:{name}", "one") for name in ("Mine", "Demanding", "Picky")))
    with pytest.raises(InputError, match=message):
        registry.default_mergers(chosen)
