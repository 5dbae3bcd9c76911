"""What answers the functions and classes that a pickle names: functions that describe tensors, plain containers, and stubs."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from mergekit_vision.checkpoints.stored import Storage, StoredTensor


class Stub:
    """Stands for an instance of any class that a pickle names, or for what any function that it names would return.

    Attributes:
        state: of an object, as a rule its attributes.
        items: of a dictionary of a class of its own, the entries under text; ``None`` where it was given none.
    """

    __slots__ = ("items", "state")
    items: dict[str, Any] | None
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        """Take any arguments. Not all pickles have ``__init__`` called too."""
        stub = object.__new__(cls)
        stub.items = stub.state = None
        return stub

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        """What stands for a function gives what stands for its result."""
        return Stub()

    def append(self, value: Any) -> None:
        """Take an item, as a subclass of a list would."""

    def extend(self, values: Any) -> None:
        """Take items, as a subclass of a list would."""


def entries(pairs: Any = ()) -> dict[str, Any]:
    """A dictionary's entries under text."""
    return {key: value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs) if isinstance(key, str)}


def texts(items: Iterable[Any] = ()) -> dict[str, None]:
    """A set's items that are text."""
    return dict.fromkeys(item for item in items if isinstance(item, str))


def _empty(*_: Any) -> dict[str, Any]:
    """What is filled by entries that follow."""
    return {}


def _tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> StoredTensor | Stub:
    """What ``torch._utils._rebuild_tensor_v2`` returns."""
    return _tensor_of_dtype(storage, offset, size, stride, None, None, storage.dtype)


def _tensor_of_dtype(
    storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], grad: Any, hooks: Any, dtype: Any, *_: Any
) -> StoredTensor | Stub:
    """The same for ``_rebuild_tensor_v3``, whose storage is of bytes."""
    tensor = StoredTensor(storage.key, dtype, storage.first + offset, tuple(size), tuple(stride))
    # one that holds elements many times could be of any size without being stored
    return tensor if math.prod(tensor.shape) <= tensor.extent else Stub()


def _first(data: Any, *_: Any) -> Any:
    """A parameter is its data here."""
    return data


def _with_type(function: Callable[..., Any], _: Any, args: tuple[Any, ...], *__: Any) -> Any:
    """A tensor that carries attributes of its own, without them."""
    return function(*args)


KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_type,
    ("torch", "Size"): tuple,
    **dict.fromkeys([("collections", "OrderedDict"), ("collections", "Counter")], entries),
    **dict.fromkeys([("builtins", "dict"), ("__builtin__", "dict")], entries),
    **dict.fromkeys([("builtins", "set"), ("__builtin__", "set")], texts),
    ("collections", "defaultdict"): _empty,
}
"""Module and name of a global -> what stands for it; everything else is a stub."""
