from pathlib import Path

import pytest

from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import closest, closest_file, raise_faults


def test_a_near_word_is_a_hint_and_a_far_one_is_none() -> None:
    assert closest("parqet", {"parquet": 1, "folder": 2}) == " (did you mean `parquet`?)"
    assert closest("x", ["parquet", "folder"]) == closest("parquet", []) == ""


def test_the_hint_at_a_missing_file_names_files_only(tmp_path: Path) -> None:
    (tmp_path / "mnist.pt").touch()
    (tmp_path / "mnist.pth").mkdir()
    assert closest_file(tmp_path / "mnits.pt") == " (did you mean `mnist.pt`?)"
    assert closest_file(tmp_path / "mnist.pt" / "x") == closest_file(tmp_path / "nowhere" / "x") == ""


def test_all_faults_are_one_error() -> None:
    raise_faults(Path("suite.yaml"), [])
    with pytest.raises(InputError) as caught:
        raise_faults(Path("suite.yaml"), ["one", "two"])
    assert str(caught.value) == "suite.yaml: 2 faults\n  one\n  two"
    with pytest.raises(InputError, match=r"^suite\.yaml: 1 fault\n  one$"):
        raise_faults(Path("suite.yaml"), ["one"])
    with pytest.raises(InputError, match=r"^suite\.yaml: one$"):
        raise_faults(Path("suite.yaml"), ["one"], brief=True)
    with pytest.raises(InputError, match=r"^suite\.yaml: 2 faults\n  one\n  two$"):
        raise_faults(Path("suite.yaml"), ["one", "two"], brief=True)


def test_of_many_faults_the_first_twenty_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        raise_faults(tmp_path, [f"fault {number}" for number in range(20_000)])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}: 20000 faults"
    assert lines[1:] == [*(f"  fault {number}" for number in range(20)), "  … and 19980 more"]
