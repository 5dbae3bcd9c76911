"""Rows of a comparison: methods with their parameters, and what else is done otherwise than in the rest of the run."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.routed import Route
from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merger
from mergekit_vision.merging.coefficient import Scale
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.merging.record import needs_images, own_parameters
from mergekit_vision.routers import ExpertDtype
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.faults import closest

_OF_THE_RUN = ("scale", "route", "expert_dtype", "tasks", "proxies")  # a method's own parameter of such a name is told apart


@dataclass(frozen=True)
class Variant:
    """A row of a comparison.

    Attributes:
        name: of the row.
        merger: the method.
        scale: its coefficient, as a :class:`~mergekit_vision.merging.recipe.Recipe` has it; the run's where ``None``.
        route: how it chooses its experts, likewise.
        proxies: fields of :class:`~mergekit_vision.data.proxies.Proxies` that are others than the run's.
        tasks: the tasks whose experts are merged, and on which the result is evaluated: that many of the suite's first, or by
            name; the run's where ``None``.
        expert_dtype: that of a dynamic model's experts; the run's where ``None``.
    """

    name: str
    merger: Merger
    scale: Scale | None = None
    route: Route | None = None
    proxies: Mapping[str, Any] = field(default_factory=dict)
    tasks: int | tuple[str, ...] | None = None
    expert_dtype: ExpertDtype | None = None

    def recipe(self, run: Recipe, suite: Suite) -> Recipe:
        """How this row is merged.

        Raises:
            InputError: when the suite does not have its tasks.
        """
        experts = run.experts if self.tasks is None else self._tasks_of(suite)
        scale, route = run.scale if self.scale is None else self.scale, self.route or run.route
        dtype: ExpertDtype = self.expert_dtype or run.expert_dtype
        if self.merger.kind != "dynamic":  # whose result is the same, also to what is remembered
            dtype = "float32"
        return replace(run, scale=scale, route=route, experts=experts, expert_dtype=dtype)

    def data(self, run: VisionTasks, draw: int = 0) -> VisionTasks:
        """The images of this row.

        Args:
            run: those of the run.
            draw: of how many draws of the proxy images; each has a seed of its own, from the row's on.

        Raises:
            InputError: when none of its tasks is evaluated.
        """
        tasks = run.task_names
        if self.tasks is not None:
            merged = self._tasks_of(run.suite)
            tasks = tuple(task for task in tasks if task in merged)
            if not tasks:
                raise InputError(f"variant {self.name}: none of its tasks is evaluated; it has {', '.join(merged)}")
        proxies = replace(run.proxies, **self.proxies)
        return run.variant(replace(proxies, seed=(proxies.seed + draw) % 2**32), tasks)

    def sees_proxies(self, run: Recipe) -> bool:
        """Whether the result depends on proxy images."""
        scale = run.scale if self.scale is None else self.scale
        return scale == "agreement" or needs_images(self.merger)

    def _tasks_of(self, suite: Suite) -> tuple[str, ...]:
        known = list(suite.tasks)
        if isinstance(self.tasks, int):
            if self.tasks > len(known):
                raise InputError(f"variant {self.name}: `tasks` is {self.tasks}, but the suite has {len(known)}")
            return tuple(known[: self.tasks])
        if unknown := [name for name in self.tasks or () if name not in known]:
            raise InputError(f"variant {self.name}: `tasks`: not in the suite: {unknown[0]}{closest(unknown[0], known)}")
        return self.tasks or ()


def settings(row: Variant, recipe: Recipe, data: VisionTasks) -> dict[str, Any]:
    """Every number and word that makes a row what it is, under one name each, such as ``base.rank`` or ``proxies.n``.

    Args:
        row: whose method it is.
        recipe: of the row.
        data: of the row.
    """
    found = parameters(row.merger)
    proxies = {f"proxies.{name}": value for name, value in asdict(data.proxies).items()}
    chosen = {"scale": recipe.scale, "route": recipe.route, "expert_dtype": recipe.expert_dtype}
    return {**found, **chosen, **proxies, "tasks": len(data.task_names)}


def parameters(merger: Merger) -> dict[str, Any]:
    """Parameters of a method and, with dots, of the methods that it is composed of."""
    return {name: value for name, value, _ in _parameters(merger)}


def differing(row: Variant) -> list[str]:
    """Names of the :func:`settings` of a row that are others than the method's own and the run's."""
    given = {"scale": row.scale, "route": row.route, "expert_dtype": row.expert_dtype, "tasks": row.tasks}
    return [
        *(name for name, _, usual in _parameters(row.merger) if not usual),
        *(name for name, value in given.items() if value is not None),
        *(f"proxies.{name}" for name in row.proxies),
    ]


def _parameters(merger: Merger, before: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Parameters of a method and of the methods among them: name, value, and whether that is the default."""
    usual = _defaults(type(merger))
    for name, value in own_parameters(merger).items():
        shown = f"{before}{name}" if before or name not in _OF_THE_RUN else f"init_args.{name}"
        if isinstance(value, Merger):
            yield shown, type(value).__name__, type(usual.get(name)) is type(value)
            yield from _parameters(value, f"{shown}.")
        else:
            yield shown, value, name in usual and usual[name] == value


def _defaults(merger: type[Merger]) -> dict[str, Any]:
    """Parameters of a method that was given none; nothing for one that must be given some."""
    try:
        return own_parameters(merger())
    except (TypeError, ValueError):  # a plugin's own constructor
        return {}


def of_mergers(mergers: Mapping[str, Merger]) -> list[Variant]:
    """Rows of methods alone, by their names."""
    return [Variant(name, merger) for name, merger in mergers.items()]
