"""Reading pickles without running anything that they name.

A pickle is a small program that may import and call whatever it likes. This reader imports nothing: PyTorch's few functions that
rebuild tensors are answered by functions of its own, plain containers by plain containers, and every other class or function by
a :class:`~mergekit_vision.checkpoints.rebuilding.Stub`, which only keeps the state it is given. So a whole pickled model can be
read for its tensors, of which only descriptions are made.

It is Python's own unpickler in Python: the faster one in C reserves as much memory as a number in the pickle says.
"""

import gc
import io
import pickle
import struct
from collections.abc import Callable
from mmap import mmap
from typing import Any, ClassVar

import torch

from mergekit_vision.checkpoints.rebuilding import KNOWN, Stub, entries, texts
from mergekit_vision.checkpoints.stored import STORAGES, Storage

UNREADABLE = (
    pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError, RuntimeError,
    ImportError, MemoryError, OverflowError, AssertionError, NotImplementedError, struct.error,
)  # fmt: skip
"""What damaged or hostile pickles and archives make their readers raise."""

LONGEST = 1 << 24
"""Size up to which a pickle is read, in bytes: enough for 100,000 tensors; reading takes up to 60 times as much memory."""

_DEEPEST = 10_000  # open lists, tuples and dictionaries


class RestrictedUnpickler(pickle._Unpickler):
    """Unpickles descriptions of tensors, plain containers and stubs.

    Of dictionaries only the entries under text are kept, as nothing else names tensors: numbers, and tuples in tuples, can be
    made to take years to be looked up. The same holds for sets, which become dictionaries of their items to ``None``.

    Args:
        stream: bytes in memory, or mapped: no more than there are is reserved to be read.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    memo: dict[int, Any]
    stack: list[Any]
    metastack: list[list[Any]]
    load_mark: Callable[[], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: io.BytesIO | mmap) -> None:
        super().__init__(stream, encoding="utf-8")

    def load(self) -> Any:
        """The next object, without the garbage collection that many objects would set off again and again."""
        self.memo.clear()  # each object numbers what it refers to from zero
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
        known = STORAGES.get(kind) if isinstance(kind, str) else None  # tuples in tuples would take years to be looked up
        return Storage(key, known or torch.uint8, first)  # others are of quantized tensors, stubs in the end

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global of the pickle; nothing is imported."""
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return KNOWN.get((module, name), Stub)

    def _mark(self) -> None:
        if len(self.metastack) > _DEEPEST:
            raise pickle.UnpicklingError("nested too deeply")
        self.load_mark()

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stub):  # nothing else may be changed by a pickle
            self.stack[-1].state = state[0] if isinstance(state, tuple) and len(state) == 2 else state

    def _put(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Stub):
            target.items = {} if target.items is None else target.items
            target = target.items
        if isinstance(target, dict):
            target.update(entries(zip(items[::2], items[1::2], strict=True)))

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
            self.stack[-1].update(texts(items))

    def _frozen_set(self) -> None:
        items = self.pop_mark()
        self.stack.append(texts(items))

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it uses registered extensions or buffers, which torch.save does not")

    dispatch |= {
        pickle.MARK[0]: _mark, pickle.BUILD[0]: _build, pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dictionary, pickle.EMPTY_SET[0]: _empty_set, pickle.ADDITEMS[0]: _add_items,
        pickle.FROZENSET[0]: _frozen_set, pickle.EXT1[0]: _refuse, pickle.EXT2[0]: _refuse, pickle.EXT4[0]: _refuse,
        pickle.BYTEARRAY8[0]: _refuse, pickle.NEXT_BUFFER[0]: _refuse, pickle.READONLY_BUFFER[0]: _refuse,
    }  # fmt: skip
