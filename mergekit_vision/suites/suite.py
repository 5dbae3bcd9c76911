"""The suite: one backbone, its tasks and their experts, described by one YAML file.

.. code-block:: yaml

    name: digits                        # optional; the file's stem otherwise
    backbone: ViT-B-32-quickgelu        # an open_clip name, hf-hub:… or local-dir:…
    pretrained: openai                  # tag or file of the weights; only for an open_clip name
    tasks:
      mnist:
        expert: experts/mnist.safetensors
        data:                           # split -> source, see mergekit_vision.sources
          val: {parquet: data/mnist/val.parquet}
          test: {parquet: data/mnist/test.parquet}
        classes: [zero, one, two]       # optional where the data names its classes
        templates: ["a photo of the digit {}."]     # optional

Paths are relative to the file.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_vision.errors import InputError
from mergekit_vision.suite_file import locate, raise_faults, read_suite

DEFAULT_TEMPLATES = ("a photo of a {}.",)

_LISTED = 8


@dataclass(frozen=True)
class Task:
    """One classification task and the encoder fine-tuned for it.

    Attributes:
        name: key of the task in its suite.
        expert: checkpoint of the fine-tuned vision tower.
        data: split -> data source (see :mod:`mergekit_vision.sources`), with absolute paths.
        classes: name of each class index, as used in prompts.
        templates: prompts; each ``{}`` stands for the class name, other braces for themselves.
        named_by_data: whether the suite left ``classes`` to the data.
    """

    name: str
    expert: Path
    data: Mapping[str, Mapping[str, object]]
    classes: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    named_by_data: bool = False


@dataclass(frozen=True)
class Suite:
    """A backbone with its tasks.

    Attributes:
        name: of the suite.
        backbone: open_clip model name, ``hf-hub:…`` or ``local-dir:…`` (absolute).
        pretrained: tag or file of the backbone's weights, for an open_clip model name.
        tasks: name -> task, in the order of the file.
        path: the file.
    """

    name: str
    backbone: str
    pretrained: str | None
    tasks: Mapping[str, Task]
    path: Path

    @classmethod
    def load(cls, path: str | Path) -> "Suite":
        """Read a suite file and check its layout.

        The name of a built-in suite, ``demo``, stands for its file, unless the working directory has a file of that name.

        Data is touched only where a task leaves its ``classes`` to the data: then that source's header is read.

        Raises:
            InputError: when the file cannot be read, or its layout is wrong; all faults are listed, one a line.
        """
        path = locate(path)
        content = read_suite(path)
        root, tasks, faults = path.parent, {}, list[str]()
        for name, task in content["tasks"].items():
            classes, unnamed = task["classes"], task["classes"] is None
            if unnamed:
                try:
                    classes = _names_in_data(task["data"])
                except InputError as error:
                    faults.append(f"tasks.{name}.classes: not given, and not found in the data: {error}")
                    continue
            templates = task["templates"] or DEFAULT_TEMPLATES
            expert = root / Path(task["expert"]).expanduser()
            tasks[name] = Task(name, expert, task["data"], tuple(classes), tuple(templates), unnamed)
        raise_faults(path, faults)
        return cls(content["name"], content["backbone"], content["pretrained"], tasks, path)

    def check(self, shapes: Mapping[str, tuple[int, ...]], splits: Collection[str] = (), experts: bool = True) -> None:
        """Check that experts and data fit the backbone, from headers alone: no weight and no image is read.

        Args:
            shapes: open_clip key -> shape of the backbone's vision tower.
            splits: splits that every task must have, each with as many classes as the task names.
            experts: whether the experts are needed; a model merged before is evaluated without them.

        Raises:
            InputError: with every fault found, one a line.
        """
        raise_faults(self.path, self.faults(shapes, dict.fromkeys(self.tasks, splits), experts))

    def faults(
        self, shapes: Mapping[str, tuple[int, ...]], splits: Mapping[str, Collection[str]], experts: bool = True
    ) -> list[str]:
        """What :meth:`check` raises, one text a fault, with other ``splits`` (task -> those it must have) for each task."""
        faults = []
        for task in self.tasks.values():
            if experts:
                faults += [f"tasks.{task.name}.expert: {fault}" for fault in _expert_faults(task.expert, shapes)]
            for split in dict.fromkeys(splits.get(task.name, ())):
                faults += [f"tasks.{task.name}.data.{split}: {fault}" for fault in _split_faults(task, split)]
        return faults


def _names_in_data(data: Mapping[str, Mapping[str, object]]) -> tuple[str, ...]:
    """Class names by the first source; its kind tells where they stand."""
    from mergekit_vision.sources import class_names

    names = class_names(next(iter(data.values())))
    if names is None:
        raise InputError("it names no classes; list them under `classes`")
    return names


def _expert_faults(expert: Path, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    from mergekit_vision.checkpoints import open_weights

    try:
        found = open_weights(expert).shapes
    except InputError as error:
        return [str(error)]
    faults = []
    missing = [key for key in shapes if key not in found]
    extra = [key for key in found if key not in shapes]
    misshapen = [
        f"{key} is {found[key]}, not {shapes[key]}" for key in shapes if key in found and found[key] != tuple(shapes[key])
    ]
    for what, keys in (("lacks", missing), ("has unknown", extra), ("has other shapes than the backbone:", misshapen)):
        if keys:
            faults.append(f"{expert} {what} {_shortened(keys)}")
    if faults:
        faults[-1] += "; an expert must be the backbone's vision tower, fine-tuned"
    return faults


def _split_faults(task: Task, split: str) -> list[str]:
    from mergekit_vision.sources import check_source, closest

    if split not in task.data:
        return [f"missing{closest(split, task.data)}; the task has {', '.join(task.data)}"]
    return check_source(task.data[split], task.classes, task.named_by_data)


def _shortened(items: Iterable[str]) -> str:
    """The first few of a list, and how many more there are.

    >>> _shortened("abcdefghij")
    'a, b, c, d, e, f, g, h … and 2 more (10 in all)'
    """
    items = list(items)
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" … and {more} more ({len(items)} in all)" if more > 0 else "")
