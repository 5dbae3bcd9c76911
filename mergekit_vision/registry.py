"""The merging methods that are installed, found by their entry points.

A package adds one by naming its class in the group ``mergekit_vision.mergers``; the name is the class's own::

    [options.entry_points]
    mergekit_vision.mergers =
        MyMethod = my_package.my_module:MyMethod
"""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merger
from mergekit_vision.support.console import logger
from mergekit_vision.support.imports import import_by_path

GROUP = "mergekit_vision.mergers"


class RegistryError(InputError):
    """A merging method is registered wrongly, or is not there."""


def mergers() -> dict[str, type[Merger]]:
    """Every installed merging method: short name -> class, sorted by name.

    One that cannot be imported is left out (see :func:`broken`), so that it does not stop the others.

    Raises:
        RegistryError: for two methods of one name, also if they differ only by case; a name that is not CamelCase or not its
            class's; an object that is no concrete ``Merger``. The message names the distributions that register them.

    >>> from mergekit_vision.registry import mergers
    >>> list(mergers())[:2]
    ['Average', 'Breadcrumbs']
    """
    return _load()[0]


class Method(NamedTuple):
    """What there is to say of an installed method.

    Attributes:
        name: its short name, as ``--model.merger`` takes it.
        title: its name in prose.
        paper: whom to cite; empty where there is no paper.
        needs: ``"none"``, unlabeled ``"proxies"``, or ``"labels"``.
        kind: ``"static"``, ``"dynamic"`` or ``"oracle"``.
        summary: what it does, in one sentence without a full stop.
    """

    name: str
    title: str
    paper: str
    needs: str
    kind: str
    summary: str


def methods() -> list[Method]:
    """Every installed merging method, described by its own class; static ones first, then by name.

    >>> from mergekit_vision.registry import methods
    >>> methods()[0].title, methods()[0].summary
    ('Weight averaging', "Mean of the experts' weights")
    """
    found = [
        Method(name, merger.title or name, merger.paper, merger.needs, merger.kind, _summary(merger))
        for name, merger in mergers().items()
    ]
    return sorted(found, key=lambda method: ({"static": 0, "dynamic": 1}.get(method.kind, 2), method.name.casefold()))


def _summary(merger: type[Merger]) -> str:
    """First line of a class's own docstring."""
    return (inspect.cleandoc(merger.__doc__ or "").splitlines() or [""])[0].removesuffix(".")


def broken() -> dict[str, Exception]:
    """Registered methods that cannot be imported: short name -> what importing them raised."""
    return _load()[1]


def get(name: str) -> type[Merger]:
    """A merging method by its short name, or by class path (``package.module.Class``) without any registration.

    Raises:
        RegistryError: if there is none, it cannot be imported, or it is no concrete ``Merger``.

    >>> get("TIES") is get("mergekit_vision.plugins.ties.TIES")
    True
    """
    if "." in name:
        return _from_path(name)
    found, failed = _load()
    if name in found:
        return found[name]
    if name in failed:
        error = failed[name]
        raise RegistryError(f"merger {name} is registered but cannot be imported: {type(error).__name__}: {error}") from error
    names = {known.casefold(): known for known in (*found, *failed)}
    close = [names[match] for match in get_close_matches(name.casefold(), names, n=1)]
    hint = f"Did you mean {close[0]}? " if close else ""
    raise RegistryError(f"there is no merger {name!r}. {hint}Installed: {', '.join(found)}; or give package.module.Class")


def _load() -> tuple[dict[str, type[Merger]], dict[str, Exception]]:
    # one class under one name is registered once, however often its metadata lie on the path
    points = {(point.name, point.value): point for point in entry_points(group=GROUP)}
    _check_names(points.values())
    found: dict[str, type[Merger]] = {}
    failed: dict[str, Exception] = {}
    for point in sorted(points.values(), key=lambda point: point.name):
        try:
            loaded = point.load()
        except Exception as error:  # whatever a third party's module raises
            failed[point.name] = error
            continue
        found[point.name] = _checked(loaded, partial(_described, point))
        if loaded.__name__ != point.name:
            raise RegistryError(f"{_described(point)}: the entry point must have the class's name, {loaded.__name__}")
    return found, failed


def _check_names(points: Iterable[EntryPoint]) -> None:
    seen: dict[str, EntryPoint] = {}
    for point in points:
        if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", point.name):
            raise RegistryError(f"{_described(point)}: a merger's name must be CamelCase, like TaskArithmetic")
        if other := seen.get(point.name.casefold()):
            raise RegistryError(
                f"two mergers of one name: {_described(other)}, and {_described(point)}; uninstall one of the two"
            )
        seen[point.name.casefold()] = point


def _from_path(path: str) -> type[Merger]:
    try:
        loaded = import_by_path(path)
    except InputError as error:
        raise RegistryError(f"merger {error}") from error
    return _checked(loaded, lambda: f"merger {path}")


def _checked(loaded: object, described: Callable[[], str]) -> type[Merger]:
    """A class that is a method; only where it is none is it described, as that reads a distribution's metadata."""
    if not (isinstance(loaded, type) and issubclass(loaded, Merger)):
        raise RegistryError(f"{described()}: {loaded!r} is not a subclass of mergekit_vision.merger.Merger")
    if inspect.isabstract(loaded):
        missing = ", ".join(sorted(loaded.__abstractmethods__))
        raise RegistryError(f"{described()}: the class is abstract, {missing} is missing")
    return loaded


def _described(point: EntryPoint) -> str:
    distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
    return f"merger {point.name} = {point.value} of {distribution}"


def default_mergers(chosen: str | Sequence[str]) -> dict[str, Merger]:
    """The methods to compare, with their default parameters.

    Args:
        chosen: ``all`` for every registered method, or names and class paths: a list, or one text with commas.

    Returns:
        Name to show -> method, in the order given.

    Raises:
        InputError: when there is none of that name, or one cannot be made without arguments.

    >>> from mergekit_vision.registry import default_mergers
    >>> list(default_mergers("TSVM, mergekit_vision.plugins.ties.TIES"))
    ['TSVM', 'TIES']
    """
    if chosen == "all" or list(chosen) == ["all"]:
        return _all_default_mergers()
    names = [name.strip() for name in (chosen.split(",") if isinstance(chosen, str) else dict.fromkeys(chosen)) if name.strip()]
    if not names:
        raise InputError("`mergers`: name at least one method, or give all", of="command")
    found = {name: get(name) for name in names}
    for name, merger in found.items():
        if missing := _required(merger):
            problem = f"has no default for {', '.join(missing)}, and is compared with its defaults only"
            raise InputError(f"`mergers` {name}: {problem}", of="command")
    short = [merger.__name__ for merger in found.values()]
    return {
        merger.__name__ if short.count(merger.__name__) == 1 else name: _with_defaults(name, merger)
        for name, merger in found.items()
    }


def _all_default_mergers() -> dict[str, Merger]:
    unfit = {name: f"it cannot be imported ({type(error).__name__}: {error})" for name, error in broken().items()}
    found = mergers()
    unfit |= {name: f"it has no default for {', '.join(missing)}" for name, m in found.items() if (missing := _required(m))}
    for name, reason in unfit.items():
        logger.info("%s is left out: %s", name, reason)
    return {name: _with_defaults(name, merger) for name, merger in found.items() if name not in unfit}


def _required(merger: type[Merger]) -> list[str]:
    """Parameters without a default."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(merger).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _with_defaults(name: str, merger: type[Merger]) -> Merger:
    try:
        return merger()
    except (ValueError, TypeError) as error:  # a plugin's own constructor
        raise InputError(f"`mergers` {name}: {error}", of="command") from error
