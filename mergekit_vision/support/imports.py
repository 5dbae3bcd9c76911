"""Objects by their dotted path."""

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mergekit_vision.errors import InputError


def import_by_path(path: str) -> Any:
    """What a dotted path such as ``torchvision.datasets.MNIST`` names.

    Raises:
        InputError: when there is no such module or name, or importing the module fails.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise InputError(f"{path!r:.80} is no dotted path such as package.module.Class")
    try:
        return getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the module raises
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error


def registered(group: str, path: str) -> Any:
    """What an installed package registers as an entry point of a group, by its name or dotted path; ``None`` where none does.

    Raises:
        InputError: when importing it fails.
    """
    for point in entry_points(group=group):
        if path in (point.name, point.value.replace(":", ".")):
            try:
                return point.load()
            except (Exception, SystemExit) as error:  # whatever the module raises
                raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return None
