"""The one error that lists all faults of a suite, taken apart."""

from collections.abc import Callable

import pytest

from mergekit_vision.errors import InputError


def faults_of(call: Callable[..., object], *args: object) -> list[str]:
    """The lines of the one error that a call raises, without the first, which must count them."""
    with pytest.raises(InputError) as caught:
        call(*args)
    head, *lines = str(caught.value).split("\n  ")
    assert "suite.yaml" in head
    assert f": {len(lines)} fault" in head
    return lines
