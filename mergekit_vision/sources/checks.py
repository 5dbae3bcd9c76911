"""Checks of a source against the classes of its task."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.config import SourceConfig, kind_of
from mergekit_vision.sources.opening import open_source


def check_source(config: SourceConfig, classes: Sequence[str], exact: bool = False, allow_code: bool = False) -> list[str]:
    """Faults of a well-formed source against the classes of its task; reads headers and label columns, never an image.

    The names that the data gives its classes may differ from those used in prompts, but a name that both use must stand for the
    same class index: a split whose classes are counted otherwise would be evaluated with wrong labels.

    Args:
        config: the source.
        classes: name of each class index.
        exact: whether the data must name its classes so too: the names come from another split.
        allow_code: as of :func:`~mergekit_vision.sources.opening.open_source`.

    A torchvision class is only imported and its arguments matched; of a hub data set only the description is fetched. For both
    :func:`content_faults` tells the rest once they are opened.
    """
    kind = kind_of(config)
    try:
        if kind == "torchvision":
            from mergekit_vision.sources.class_path import import_class

            import_class(config["torchvision"], config.get("args", {}), allow_code)
            return []
        if kind == "hub":
            return _name_faults(class_names(config), classes, exact)
        return content_faults(open_source(config), classes, exact)
    except InputError as error:
        return [str(error)]


def content_faults(source: ImageSource, classes: Sequence[str], exact: bool = False) -> list[str]:
    """Faults of an open source's class names and labels; arguments as of :func:`check_source`.

    Raises:
        InputError: when the labels cannot be read.
    """
    if faults := _name_faults(source.names, classes, exact):
        return faults
    labels = source.label_range()
    if labels is None:
        return ["holds no images"]
    if not 0 <= labels[0] <= labels[1] < len(classes):
        known = f"with {len(classes)} classes they must lie in 0 to {len(classes) - 1}"
        return [f"labels run from {labels[0]} to {labels[1]}, but {known}"]
    return []


def _name_faults(names: Sequence[str] | None, classes: Sequence[str], exact: bool) -> list[str]:
    """What is wrong with the names that the data gives its classes.

    >>> from mergekit_vision.sources.checks import _name_faults
    >>> _name_faults(["circle", "ring"], ["ring", "circle"], exact=False)
    ['class 0 is `circle` in the data, but `ring` under `classes`; list them in the order of the data']
    """
    theirs = "in the task's first split" if exact else "under `classes`"
    if names is None or list(names) == list(classes):
        return []
    missing = [f"`{name}`" for name in classes if name and name not in names] if exact or set(names) & set(classes) else []
    lacking = f"; {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} missing here" if missing else ""
    if len(names) != len(classes):
        return [f"the data has {len(names)} classes, but there are {len(classes)} {theirs}{lacking}"]
    differing = (i for i, name in enumerate(names) if name != classes[i])
    moved = next(differing if exact else _moved(names, classes), None)
    if moved is None:
        return []
    remedy = "name them alike in all splits" if exact else "list them in the order of the data"
    return [f"class {moved} is `{names[moved]}` in the data, but `{classes[moved]}` {theirs}{lacking}; {remedy}"]


def _moved(names: Sequence[str], classes: Sequence[str]) -> Iterator[int]:
    """Classes with a name that is another class's on the other side, exactly or but for case, punctuation and spaces."""
    for form in (str, _plain):
        theirs, ours = list(map(form, names)), list(map(form, classes))
        once = [{name for name, count in Counter(side).items() if count == 1} for side in (theirs, ours)]
        shared = set.intersection(*once)
        yield from (i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1] and shared & {*pair})


def _plain(name: str) -> str:
    """A class name without what people write differently."""
    return "".join(re.split(r"[\W_]+", name.casefold())) or name


def class_names(config: SourceConfig, allow_code: bool = False) -> tuple[str, ...] | None:
    """Class names that a well-formed source knows, or ``None``; of a hub data set only the description is fetched.

    Raises:
        InputError: when the source cannot be opened.
    """
    if kind_of(config) == "hub":
        from mergekit_vision.sources.hub import hub_class_names

        return hub_class_names(config)
    return open_source(config, allow_code=allow_code).names
