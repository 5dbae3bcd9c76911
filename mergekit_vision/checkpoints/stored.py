"""Tensors as a pickle describes them, before they are read."""

from dataclasses import dataclass

import torch

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
"""Name of a storage class in a pickle -> dtype of its elements."""

_MOST_AXES = 64  # that PyTorch handles
_TOO_LARGE = 1 << 63  # for a size in PyTorch


@dataclass(frozen=True)
class Storage:
    """The memory behind tensors.

    Attributes:
        key: its name in the file.
        dtype: of its elements.
        first: the element at which offsets begin to count.
    """

    key: str
    dtype: torch.dtype
    first: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.key, str):
            raise ValueError("a storage without a name")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file describes it; sizes, strides and the offset count elements.

    Attributes:
        key: name of its storage.
        dtype: of its elements.
        offset: of the first element in the storage.
        shape: its sizes.
        stride: its strides, as many.
    """

    key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.stride)
        sound = isinstance(self.dtype, torch.dtype) and len(self.shape) == len(self.stride) <= _MOST_AXES
        if not sound or not all(isinstance(number, int) and 0 <= number < _TOO_LARGE for number in numbers):
            raise ValueError("a tensor of impossible sizes")

    @property
    def extent(self) -> int:
        """How many elements lie between its first and its last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
