"""The suite: one backbone, its tasks and their experts, described by one YAML file.

.. code-block:: yaml

    name: digits                        # optional; the file's stem otherwise
    backbone: ViT-B-32-quickgelu        # an open_clip name, hf-hub:… or local-dir:…
    pretrained: openai                  # tag or file of the weights; only for an open_clip name
    tasks:
      mnist:
        expert: experts/mnist.safetensors    # or hf-hub:ORG/NAME, or a mapping: see mergekit_vision.checkpoints.expert
        data:                           # split -> source, see mergekit_vision.sources.config
          val: {parquet: data/mnist/val.parquet}
          test: {parquet: data/mnist/test.parquet}
        classes: [zero, one, two]       # optional where the data names its classes
        templates: ["a photo of the digit {}."]     # optional

Paths are relative to the file. With ``extends: tall/ViT-B-32-8`` it only has what differs from a published suite, and
``experts_root`` and ``data_root`` name directories in which experts and data are looked up; see
:mod:`mergekit_vision.suites.composing`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_vision.checkpoints import Expert, ExpertSource, open_expert
from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import class_names
from mergekit_vision.suites.catalog import published
from mergekit_vision.suites.layout import locate, read_suite
from mergekit_vision.support.faults import raise_faults

DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class Task:
    """One classification task and the encoder fine-tuned for it.

    Attributes:
        name: key of the task in its suite.
        expert: where the fine-tuned vision tower is, and how it is read.
        data: split -> data source (see :mod:`mergekit_vision.sources.config`), with absolute paths.
        classes: name of each class index, as used in prompts.
        templates: prompts; each ``{}`` stands for the class name, other braces for themselves.
        named_by_data: whether the suite left ``classes`` to the data.
        accuracy: published accuracy of the expert, in percent.
        at_most: accuracy in percent above which an expert has seen the test images.
        misnamed: classes that have another class's name on purpose, as the expert was trained so.
        traps: what is known to go wrong with the task.
    """

    name: str
    expert: ExpertSource
    data: Mapping[str, Mapping[str, object]]
    classes: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    named_by_data: bool = False
    accuracy: float | None = None
    at_most: float | None = None
    misnamed: tuple[int, ...] = ()
    traps: tuple[str, ...] = ()

    @property
    def data_classes(self) -> tuple[str, ...]:
        """The classes by the names that the data may give them; empty text for those that are :attr:`misnamed`."""
        return tuple("" if index in self.misnamed else name for index, name in enumerate(self.classes))


@dataclass(frozen=True)
class Suite:
    """A backbone with its tasks.

    Attributes:
        name: of the suite.
        backbone: open_clip model name, ``hf-hub:…`` or ``local-dir:…`` (absolute).
        pretrained: tag or file of the backbone's weights, for an open_clip model name.
        tasks: name -> task, in the order of the file.
        path: the file.
        allow_code: whether data set classes that no installed package registers may be imported and called.
    """

    name: str
    backbone: str
    pretrained: str | None
    tasks: Mapping[str, Task]
    path: Path
    allow_code: bool = False

    @classmethod
    def load(cls, path: str | Path, allow_code: bool = False) -> "Suite":
        """Read a suite file and check its layout.

        The name of a built-in suite, such as ``demo`` or ``tall/ViT-B-32-8``, stands for its file, unless the working directory
        has a file of that name.

        Data is touched only where a task leaves its ``classes`` to the data: then that source's header is read.

        Raises:
            InputError: when the file cannot be read, or its layout is wrong; all faults are listed, one a line.
        """
        path = locate(path)
        content = read_suite(path)
        tasks, faults = {}, list[str]()
        for name, task in content["tasks"].items():
            classes, unnamed = task["classes"], task["classes"] is None
            if unnamed:
                try:
                    classes = _names_in_data(task["data"], allow_code)
                except InputError as error:
                    faults.append(f"tasks.{name}.{error}")
                    continue
            templates = tuple(task["templates"] or DEFAULT_TEMPLATES)
            known = {key: task[key] for key in ("accuracy", "at_most", "misnamed", "traps")}
            tasks[name] = Task(name, task["expert"], task["data"], tuple(classes), templates, unnamed, **known)
        raise_faults(path, faults)
        return cls(content["name"], content["backbone"], content["pretrained"], tasks, path, allow_code)

    @property
    def root(self) -> Path:
        """Where relative paths that go with the suite start: beside its file; of a published suite in the working directory."""
        return Path.cwd() if self.path in published().values() else self.path.parent

    @cached_property
    def experts(self) -> Mapping[str, Expert]:
        """Task -> its expert's checkpoint, each opened once, when it is first asked for; opening raises an ``InputError``."""
        return _Experts({name: task.expert for name, task in self.tasks.items()})


class _Experts(Mapping[str, Expert]):
    """Checkpoints by task, opened on demand and kept open."""

    def __init__(self, sources: Mapping[str, ExpertSource]) -> None:
        self._sources = sources
        self._opened: dict[str, Expert] = {}

    def __getitem__(self, task: str) -> Expert:
        if task not in self._opened:
            self._opened[task] = open_expert(self._sources[task])
        return self._opened[task]

    def __contains__(self, task: object) -> bool:
        return task in self._sources  # the inherited one would open the file

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def _names_in_data(data: Mapping[str, Mapping[str, object]], allow_code: bool) -> tuple[str, ...]:
    """Class names by the first source; its kind tells where they stand.

    Raises:
        InputError: when it cannot be opened or has none; the message begins with the key in the task.
    """
    split, source = next(iter(data.items()))
    try:
        names = class_names(source, allow_code)
    except InputError as error:
        raise InputError(f"data.{split}: {error}") from error
    if names is None:
        raise InputError(f"classes: not given, and the data ({split}) names none; list them under `classes`")
    return names
