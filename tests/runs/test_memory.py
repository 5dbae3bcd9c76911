"""Memory that runs out."""

import pytest
import torch

from mergekit_vision import InputError
from mergekit_vision.runs.memory import explained_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_what_torch_could_not_get_is_said() -> None:
    with (
        pytest.raises(
            InputError, match=r"^merging ran out of memory on cpu \(\d+ bytes more were needed at once\); merge"
        ) as caught,
        explained_memory("merging", CPU),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "^merging ran out of memory on cuda:0; use the CPU"),
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB"),
            r"on cuda:0 \(2.50 GiB more were needed at once\); use the CPU \(`accelerator` cpu\), or merge fewer experts",
        ),
    ],
)
def test_an_accelerator_has_the_cpu_beside_it(error: Exception, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught, explained_memory("merging", GPU):
        raise error
    assert caught.value.of == "trainer"


def test_other_errors_are_not_explained() -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"), explained_memory("merging", CPU):
        raise RuntimeError("shapes do not fit")
