"""Checks of a suite's experts and data against its backbone, from headers alone: no weight and no image is read."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from mergekit_vision.checkpoints import Expert
from mergekit_vision.checkpoints.opening import check_static
from mergekit_vision.checkpoints.sizes import tower_sizes
from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import check_source
from mergekit_vision.suites.layout import LOCAL
from mergekit_vision.suites.suite import Suite, Task
from mergekit_vision.support.faults import closest, raise_faults

Shapes = Mapping[str, tuple[int, ...]]
"""Key of the vision tower -> shape."""

_LISTED = 8


def check_suite(
    suite: Suite, shapes: Shapes, splits: Collection[str] = (), experts: bool = True, activation: str | None = None
) -> None:
    """Check that experts and data fit the backbone.

    Args:
        suite: what is checked.
        shapes: of the backbone's vision tower.
        splits: splits that every task must have, each with as many classes as the task names.
        experts: whether the experts are needed; a model merged before is evaluated without them.
        activation: of the backbone, ``quick_gelu`` or ``gelu``: experts that say that they have another are at fault.

    Raises:
        InputError: with every fault found, one a line.
    """
    needed = None if experts else ()
    raise_faults(suite.path, suite_faults(suite, shapes, dict.fromkeys(suite.tasks, splits), needed, activation))


def suite_faults(
    suite: Suite,
    shapes: Shapes,
    splits: Mapping[str, Collection[str]],
    experts: Collection[str] | None = None,
    activation: str | None = None,
) -> list[str]:
    """What :func:`check_suite` raises, one text a fault.

    Args:
        suite: what is checked.
        shapes: of the backbone's vision tower.
        splits: task -> splits that it must have.
        experts: tasks whose experts are looked at; all where ``None``.
        activation: of the backbone.
    """
    experts = suite.tasks if experts is None else experts
    shared = [*_backbone_faults(suite), *_shared_faults(suite, shapes, experts, activation)]
    faults = [f"backbone: {fault}" for fault in shared]
    for task in suite.tasks.values():
        if task.name in experts and not shared:
            faults += [f"tasks.{task.name}.expert: {fault}" for fault in _expert_faults(suite, task, shapes, activation)]
        for split in dict.fromkeys(splits.get(task.name, ())):
            faults += [f"tasks.{task.name}.data.{split}: {fault}" for fault in _split_faults(suite, task, split)]
    return faults


def _backbone_faults(suite: Suite) -> list[str]:
    try:
        if suite.backbone.startswith(LOCAL):
            check_static(Path(suite.backbone.removeprefix(LOCAL)))
    except InputError as error:
        return [str(error)]
    return []


def _shared_faults(suite: Suite, shapes: Shapes, experts: Collection[str], activation: str | None) -> list[str]:
    """What keeps all experts alike from fitting the backbone, which then is another than theirs; none of a single expert."""
    try:
        found = [expert_faults(suite.experts[task], "each expert", shapes, activation) for task in suite.tasks if task in experts]
    except InputError:  # one cannot be opened
        return []
    return found[0] if len(found) > 1 and all(faults == found[0] for faults in found) else []


def _expert_faults(suite: Suite, task: Task, shapes: Shapes, activation: str | None) -> list[str]:
    try:
        return expert_faults(suite.experts[task.name], str(task.expert), shapes, activation)
    except InputError as error:
        return [str(error)]


def expert_faults(expert: Expert, name: str, shapes: Shapes, activation: str | None = None) -> list[str]:
    """Why an expert does not fit a backbone, as far as headers tell, one text a fault.

    Args:
        expert: what is checked.
        name: of the expert, for the texts.
        shapes: of the backbone's vision tower.
        activation: of the backbone, ``quick_gelu`` or ``gelu``.
    """
    if other := _other_architecture(expert, shapes, activation):
        return [f"{name} {other}"]
    faults, found = [], expert.shapes
    missing = [key for key in shapes if key not in found and not expert.relative and key not in expert.optional]
    extra = [key for key in found if key not in shapes]
    misshapen = [
        f"{key} is {found[key]}, not {shapes[key]}" for key in shapes if key in found and found[key] != tuple(shapes[key])
    ]
    for what, keys in (("lacks", missing), ("has unknown", extra), ("has other shapes than the backbone:", misshapen)):
        if keys:
            faults.append(f"{name} {what} {_shortened(keys)}")
    if faults:
        faults[-1] += "; an expert must be the backbone's vision tower, fine-tuned"
    return faults


def _other_architecture(expert: Expert, shapes: Shapes, activation: str | None) -> str | None:
    """What tells that an expert is of another architecture than the backbone, in a few words; ``None`` where nothing does."""
    own = expert.origin.get("activation")
    if activation is not None and own is not None and own != activation:
        return f"has the activation function {own}, and the backbone {activation}; name the backbone that it was fine-tuned from"
    found, sizes = tower_sizes(expert.shapes), tower_sizes(shapes)
    compared = [size for size in sizes if size in found and not (size == "layers" and expert.relative)]
    other = [size for size in compared if found[size] != sizes[size]]
    if not other:
        return None
    told = [", ".join(f"{size} {which[size]}" for size in other) for which in (found, sizes)]
    return f"is of another architecture: {told[0]}, where the backbone has {told[1]}"


def _split_faults(suite: Suite, task: Task, split: str) -> list[str]:
    if split not in task.data:
        return [f"missing{closest(split, task.data)}; the task has {', '.join(task.data)}"]
    return check_source(task.data[split], task.data_classes, task.named_by_data, suite.allow_code)


def _shortened(items: Iterable[str]) -> str:
    """The first few of a list, and how many more there are.

    >>> from mergekit_vision.suites.checks import _shortened
    >>> _shortened("abcdefghij")
    'a, b, c, d, e, f, g, h … and 2 more (10 in all)'
    """
    items = list(items)
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" … and {more} more ({len(items)} in all)" if more > 0 else "")
