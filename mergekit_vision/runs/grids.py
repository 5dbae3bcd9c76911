"""Grids of a method's parameters: every combination of some values, each the method with these."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merger
from mergekit_vision.merging.record import class_path, own_parameters, parameter_fault
from mergekit_vision.runs.building import build_merger
from mergekit_vision.support.json_files import readable, to_json
from mergekit_vision.support.schema import brief

Grid = Mapping[str, Sequence[Any]]
"""Parameter -> values to try; that of a method which is itself a parameter with a dot, as ``base.rank``."""

_MOST = 1000  # combinations


class GridRow(NamedTuple):
    """One combination of a grid's values.

    Attributes:
        name: says them in words.
        values: parameter -> value.
        merger: the method with them.
    """

    name: str
    values: Mapping[str, Any]
    merger: Merger


def grid_rows(merger: Merger, grid: Grid) -> list[GridRow]:
    """The method with every combination of a grid's values; what the grid does not name is as in ``merger``.

    Raises:
        InputError: when the grid is empty or too large, or has a parameter or a value that the method does not take.

    >>> from mergekit_vision.plugins.ties import TIES
    >>> from mergekit_vision.runs.grids import grid_rows
    >>> [row.name for row in grid_rows(TIES(), {"density": [0.1, 0.2]})]
    ['density 0.1', 'density 0.2']
    """
    _check_sizes(grid)
    combinations = (dict(zip(grid, values, strict=True)) for values in product(*grid.values()))
    return [GridRow(_named(values), values, _with(merger, values)) for values in combinations]


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {readable(value)}" for name, value in values.items())


def _check_sizes(grid: Grid) -> None:
    if not grid:
        raise InputError("`grid` is empty; name parameters and values, such as '{rank: [4, 8]}'", of="command")
    for name, values in grid.items():
        if not isinstance(name, str) or not name:
            raise InputError(f"`grid`: {brief(name)} is no parameter's name", of="command")
        if not values:
            raise InputError(f"`grid`: {name} has no values", of="command")
        if len({to_json(value) for value in values}) < len(values):
            raise InputError(f"`grid`: {name} has a value twice", of="command")
    if (combinations := math.prod(map(len, grid.values()))) > _MOST:
        raise InputError(f"`grid` has {combinations} combinations, but may have {_MOST}; name fewer values", of="command")


def _with(merger: Merger, values: Mapping[str, Any]) -> Merger:
    """The method with some of its parameters changed."""
    if (fault := parameter_fault(merger)) is not None:
        raise InputError(f"grid: {fault}")
    content = as_content(merger)
    for name, value in values.items():
        part, owner = content, ""
        *owners, last = name.split(".")
        for step in owners:
            owner = f"{owner}{step}."
            part = part["init_args"].get(step)
            if not isinstance(part, dict) or "init_args" not in part:
                raise InputError(f"grid: {name}: {owner[:-1]} is no method that has parameters")
        part["init_args"][last] = value
    try:
        return build_merger(content)
    except ValueError as error:
        raise InputError(f"grid: {str(error).replace('init_args.', '')}") from error


def as_content(merger: Merger) -> dict[str, Any]:
    """A method as a configuration file names it: ``class_path`` and ``init_args``, those of methods inside it likewise."""
    arguments = {
        name: as_content(value) if isinstance(value, Merger) else value for name, value in own_parameters(merger).items()
    }
    return {"class_path": class_path(merger), "init_args": arguments}
