"""Where the weights of backbones are."""

from typing import NoReturn

import pytest

from mergekit_vision.encoders.presence import pretrained_place


def test_nobody_needs_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> NoReturn:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert not pretrained_place("RN50", "cc12m")[0]
