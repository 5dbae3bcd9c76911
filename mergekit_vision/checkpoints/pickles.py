"""Reading pickles without running anything that they name.

A pickle is a small program that may import and call whatever it likes. This reader imports nothing: PyTorch's few functions that
rebuild tensors are answered by functions of its own, plain containers by plain containers, and every other class or function by
a :class:`Stub`, which only keeps the state it is given. So a whole pickled model can be read for its tensors, of which only
descriptions are made.

It is Python's own unpickler in Python: the faster one in C reserves as much memory as a number in the pickle says.
"""

import gc
import io
import math
import pickle
from collections.abc import Callable, Iterable
from mmap import mmap
from typing import Any, ClassVar

import torch

from mergekit_vision.checkpoints.stored import STORAGES, Storage, StoredTensor

UNREADABLE = (
    pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError, RuntimeError,
    ImportError, MemoryError, OverflowError, AssertionError, NotImplementedError,
)  # fmt: skip
"""What damaged or hostile pickles and archives make their readers raise."""

LONGEST = 1 << 24
"""Size up to which a pickle is read, in bytes: enough for 100,000 tensors; reading takes up to 60 times as much memory."""


_DEEPEST = 10_000  # open lists, tuples and dictionaries


class Stub:
    """Stands for an instance of any class that a pickle names, or for what any function that it names would return."""

    __slots__ = ("state",)

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        """Take any arguments."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.state: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        """What stands for a function gives what stands for its result."""
        return Stub()

    def append(self, value: Any) -> None:
        """Take an item, as a subclass of a list would."""

    def extend(self, values: Any) -> None:
        """Take items, as a subclass of a list would."""


class RestrictedUnpickler(pickle._Unpickler):
    """Unpickles descriptions of tensors, plain containers and stubs.

    Of dictionaries only the entries under text are kept, as nothing else names tensors: numbers, and tuples in tuples, can be
    made to take years to be looked up. The same holds for sets, which become dictionaries of their items to ``None``.

    Args:
        stream: bytes in memory, or mapped: no more than there are is reserved to be read.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    metastack: list[list[Any]]
    load_mark: Callable[[], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO | mmap) -> None:
        super().__init__(stream, encoding="utf-8")

    def load(self) -> Any:
        """The next object, without the garbage collection that many objects would set off again and again."""
        collected = gc.isenabled()
        gc.disable()
        try:
            return super().load()
        finally:
            if collected:
                gc.enable()

    def persistent_load(self, pid: Any) -> Any:
        """A storage by what ``torch.save`` writes in its place, or a class that it writes beside its source."""
        if pid[0] == "module":  # of PyTorch before 1.6: the class, its file and its source
            return pid[1]
        _, kind, key, _, _, *view = pid
        first = view[0][1] if view and view[0] is not None else 0
        return Storage(key, STORAGES.get(str(kind), torch.uint8), first)  # others are of quantized tensors, stubs in the end

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global of the pickle; nothing is imported."""
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return _KNOWN.get((module, name), Stub)

    def _mark(self) -> None:
        if len(self.metastack) > _DEEPEST:
            raise pickle.UnpicklingError("nested too deeply")
        self.load_mark()

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stub):  # nothing else may be changed by a pickle
            self.stack[-1].state = state[0] if isinstance(state, tuple) and len(state) == 2 else state

    def _put(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_entries(zip(items[::2], items[1::2], strict=True)))

    def _set_items(self) -> None:
        self._put(self.pop_mark())

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def _dictionary(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._put(items)

    def _empty_set(self) -> None:
        self.stack.append({})

    def _add_items(self) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(_texts(items))

    def _frozen_set(self) -> None:
        items = self.pop_mark()
        self.stack.append(_texts(items))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it uses registered extensions or buffers, which torch.save does not")

    dispatch |= {
        pickle.MARK[0]: _mark, pickle.BUILD[0]: _build, pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dictionary, pickle.EMPTY_SET[0]: _empty_set, pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _frozen_set, pickle.EXT1[0]: _refuse, pickle.EXT2[0]: _refuse, pickle.EXT4[0]: _refuse,
        pickle.BYTEARRAY8[0]: _refuse, pickle.NEXT_BUFFER[0]: _refuse, pickle.READONLY_BUFFER[0]: _refuse,
    }  # fmt: skip


def _entries(pairs: Any = ()) -> dict[str, Any]:
    """A dictionary's entries under text."""
    return {key: value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs) if isinstance(key, str)}


def _texts(items: Iterable[Any] = ()) -> dict[str, None]:
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


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_type,
    ("torch", "Size"): tuple,
    **dict.fromkeys([("collections", "OrderedDict"), ("builtins", "dict"), ("__builtin__", "dict")], _entries),
    **dict.fromkeys([("builtins", "set"), ("__builtin__", "set")], _texts),
    ("collections", "defaultdict"): _empty,
}
