"""Reading pickles without running anything that they name.

A pickle is a small program that may import and call whatever it likes. This reader imports nothing: PyTorch's few functions that
rebuild tensors are answered by functions of its own, plain containers by plain containers, and every other class or function by
a :class:`Stub`, which only keeps the state it is given. So a whole pickled model can be read for its tensors.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
"""Name of a storage class in a pickle -> dtype of its elements."""

UNREADABLE = (
    pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError, RuntimeError,
    ImportError, MemoryError, OverflowError, AssertionError,
)  # fmt: skip
"""What damaged or hostile pickles and archives make their readers raise."""

_PLAIN = (str, int, float, bool, type(None))
_DEPTH = 48


class Storage(NamedTuple):
    """The memory behind tensors: bytes, and the dtype that the pickle gives them."""

    content: torch.UntypedStorage
    dtype: torch.dtype


class Stub:
    """Stands for an instance of any class that a pickle names, or for what any function that it names would return."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        """Take any arguments."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        """What stands for a function gives what stands for its result."""
        return Stub()

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state[0] if isinstance(state, tuple) and len(state) == 2 else state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an entry, as a subclass of a dictionary would."""

    def append(self, value: Any) -> None:
        """Take an item, as a subclass of a list would."""

    def extend(self, values: Any) -> None:
        """Take items, as a subclass of a list would."""

    def add(self, *values: Any) -> None:
        """Take items, as a set would."""


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles tensors, plain containers and stubs."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global of the pickle; nothing is imported."""
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        # made anew each time: a pickle may set attributes of what it gets
        if (module, name) in _REBUILDERS:
            return _calling(_REBUILDERS[module, name])
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "dict"), ("__builtin__", "dict")):
            return type("OrderedDict", (dict,), {})
        if name == "set" and module in ("builtins", "__builtin__"):
            return set
        return type(str(name), (Stub,), {"__module__": str(module)})


def leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Tensors, stubs without state, and plain values of an unpickled object, by their dotted place in it.

    Entries of dictionaries and attributes of objects are followed; of a module its parameters, its persistent buffers and its
    modules. Lists are plain values where all their items are, and are passed over otherwise.

    Raises:
        ValueError: when it is nested too deeply.

    >>> dict(leaves({"state_dict": {"proj": torch.zeros(2)}, "epoch": 3}))
    {'state_dict.proj': tensor([0., 0.]), 'epoch': 3}
    """
    yield from _leaves(content, "", set(), 0)


def _leaves(content: Any, place: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(content, Tensor) or _is_plain(content):
        yield place, content
        return
    members = _members(content)
    if members is None:
        if isinstance(content, Stub):
            yield place, content
        return
    if id(content) in seen:  # what refers to itself, or to one thing many times, would never end
        return
    seen.add(id(content))
    for name, value in members.items():
        if isinstance(name, str):
            yield from _leaves(value, f"{place}.{name}" if place else name, seen, depth + 1)


def _members(content: Any) -> Mapping[Any, Any] | None:
    """Named parts of an object; ``None`` where it has none."""
    if isinstance(content, dict):
        return dict(dict.items(content))
    state = content.__dict__.get("state") if isinstance(content, Stub) else None
    if not isinstance(state, dict):
        return None
    if "_modules" not in state:
        return state
    transient = state.get("_non_persistent_buffers_set")
    skipped = transient if isinstance(transient, set) else set()
    parts = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items() if name not in skipped}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)


def _calling(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*args)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """What ``torch._utils._rebuild_tensor_v2`` returns; its storage is of this reader, or of ``torch.load``."""
    return torch.empty(0, dtype=storage.dtype).set_(_bytes(storage), offset, tuple(size), tuple(stride))


def _tensor_of_dtype(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], grad: Any, hooks: Any, dtype: torch.dtype, *_: Any
) -> Tensor:
    """The same for ``_rebuild_tensor_v3``, whose storage is of bytes."""
    return torch.empty(0, dtype=dtype).set_(_bytes(storage), offset, tuple(size), tuple(stride))


def _bytes(storage: Any) -> torch.UntypedStorage:
    """The memory of a storage of this reader, or of ``torch.load``, whose own method for it warns."""
    content: torch.UntypedStorage = storage.content if isinstance(storage, Storage) else storage._untyped_storage
    return content


def _first(data: Any, *_: Any) -> Any:
    """A parameter is its data here."""
    return data


def _with_type(function: Callable[..., Any], _: Any, args: tuple[Any, ...], *__: Any) -> Any:
    """A tensor that carries attributes of its own, without them."""
    return function(*args)


_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_type,
    ("torch", "Size"): tuple,
}
