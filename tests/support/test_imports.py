import sys
from pathlib import Path

import pytest

from mergekit_vision.errors import InputError
from mergekit_vision.support.imports import import_by_path


def test_a_dotted_path_names_what_is_in_the_module() -> None:
    assert import_by_path("pathlib.Path") is Path
    assert import_by_path("mergekit_vision.errors.InputError") is InputError


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Path", "'Path' is no dotted path such as package.module.Class"),
        ("", "is no dotted path"),
        ("no_such_package.Path", "no_such_package.Path cannot be imported: ModuleNotFoundError: "),
        ("pathlib.Pfad", "pathlib.Pfad cannot be imported: AttributeError: "),
    ],
)
def test_a_path_that_leads_nowhere_says_why(path: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        import_by_path(path)
    assert message in str(caught.value)


def test_whatever_a_module_raises_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_broken_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"their_broken_module\.Thing cannot be imported: ZeroDivisionError: division by zero"):
        import_by_path("their_broken_module.Thing")
    assert "their_broken_module" not in sys.modules
