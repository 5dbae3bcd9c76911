"""YAML files from anyone: read as plain values, within limits, or refused in one line."""

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml

from mergekit_vision.errors import InputError
from mergekit_vision.support.paths import read_text

_LARGEST = 4 << 20  # bytes of a file; PyYAML reads some hundred thousand a second
_VALUES, _LEVELS = 1_000_000, 100  # once aliases are written out
_DIGITS = 77  # of a whole number: 256 bits

_UNUSABLE = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What PyYAML raises for text that is not YAML, and for values that are not what their tags say."""


def read_yaml(path: Path) -> Any:
    """Content of a YAML file as plain values.

    Raises:
        InputError: when the file cannot be read, is no YAML of plain values, gives a key twice, or is larger, nested deeper or
            expands further than anything sensible.
    """
    return parse_yaml(read_text(path, _LARGEST), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """Plain values of YAML text.

    Args:
        text: what :func:`read_yaml` reads.
        name: where it stands, for messages.

    Raises:
        InputError: as there.
    """
    try:
        return _loaded(_PlainLoader(text))
    except RecursionError as error:
        raise InputError(f"{name}: nested more than {_LEVELS} levels deep") from error
    except _UNUSABLE as error:
        raise InputError(f"{name}: not valid YAML: {_reason(error)}") from error


def _loaded(loader: "_PlainLoader") -> Any:
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        values, levels = _extent(node, {})
        if values > _VALUES:
            raise ValueError(f"its aliases stand for more than {_VALUES} values, or for themselves")
        if levels > _LEVELS:
            raise RecursionError
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for and how many levels deep, aliases written out; a node within itself is endless."""
    if id(node) not in known:
        known[id(node)] = (_VALUES + 1, 1)
        inner = [_extent(part, known) for part in _parts(node)]
        known[id(node)] = (1 + sum(values for values, _ in inner), 1 + max((levels for _, levels in inner), default=0))
    return known[id(node)]


def _parts(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return (part for pair in node.value for part in pair)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _reason(error: Exception) -> str:
    """One line of what is wrong, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split()) or type(error).__name__


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader, except that some of what it accepts is an error: a key given twice, and values of no use anywhere."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value
            if isinstance(key, str) and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except _UNUSABLE as error:
            if isinstance(error, yaml.YAMLError):
                raise
            problem = f"{node.value!r:.40} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > 256:
            problem = f"a whole number of more than {_DIGITS} digits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            problem = "half of a character (a surrogate); write the character itself"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value
