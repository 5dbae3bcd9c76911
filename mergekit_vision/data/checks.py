"""Checks of a suite and its images before anything heavy starts."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergekit_vision.data.images import SuiteImages
from mergekit_vision.encoders.backbone import Backbone
from mergekit_vision.errors import InputError
from mergekit_vision.sources.config import is_fetched
from mergekit_vision.suites.checks import suite_faults
from mergekit_vision.suites.splits import VAL
from mergekit_vision.support.faults import closest, raise_faults


@dataclass(frozen=True)
class Needs:
    """What a run reads of a suite.

    Attributes:
        evaluated: splits of the tasks to evaluate.
        everywhere: splits of all tasks, such as the one that a coefficient is searched on.
        experts: whether the experts are read.
        proxies: whether proxy images may be asked for. Tasks without the default split ``val`` are let pass, since many methods
            need no images.
        judged: tasks whose proxy images are sure to be asked for, such as by experts that judge by them; all where ``None``.
        merged: tasks whose proxy images may be asked for, those whose experts are merged; all where ``None``.
    """

    evaluated: Collection[str] = ()
    everywhere: Collection[str] = ()
    experts: bool = True
    proxies: bool = False
    judged: Collection[str] | None = ()
    merged: Collection[str] | None = None

    def proxies_of(self, tasks: Iterable[str]) -> list[str]:
        """Those of some tasks whose proxy images may be asked for."""
        return [task for task in tasks if self.proxies and (self.merged is None or task in self.merged)]


class SuiteChecks:
    """Finds what is wrong with a suite; what was checked before is not checked again.

    Args:
        images: of the suite.
        backbone: gives what is known of the backbone.
    """

    def __init__(self, images: SuiteImages, backbone: Callable[[], Backbone]) -> None:
        self._images, self._backbone = images, backbone
        self._suite, self._proxies = images.suite, images.proxies
        self._splits: set[tuple[str, str]] = set()
        self._experts = False

    def __call__(self, chosen: Sequence[str], needs: Needs) -> None:
        """Check what a run needs.

        Args:
            chosen: the tasks to evaluate.
            needs: what is read.

        Raises:
            InputError: with every fault that headers show, one a line; then with those of the proxy images themselves.
        """
        wanted = {task: {*needs.everywhere, *(needs.evaluated if task in chosen else ())} for task in self._suite.tasks}
        for task in self._proxy_tasks(needs) if self._proxies.source is None else ():
            wanted[task].add(self._proxies.split)
        unchecked = {task: sorted(split for split in wanted[task] if (task, split) not in self._splits) for task in wanted}
        experts = needs.experts and not self._experts
        faults = self._header_faults(unchecked, experts)
        raise_faults(self._suite.path, faults + (self._proxy_faults() if needs.proxies else []))
        self._splits |= {(task, split) for task, names in unchecked.items() for split in names}
        self._experts |= experts
        if needs.proxies:
            raise_faults(self._suite.path, self._draw_faults(needs))

    def _proxy_tasks(self, needs: Needs) -> list[str]:
        """Tasks whose own split the proxies are drawn from and checked; without the default split most may need none."""
        split, tasks = self._proxies.split, self._suite.tasks
        having, wanted = [task for task in tasks if split in tasks[task].data], needs.proxies_of(tasks)
        if split != VAL:
            return wanted if having else []  # that no task has it is one fault
        judged = tasks if needs.judged is None else needs.judged
        return [task for task in wanted if task in having or task in judged]

    def _header_faults(self, splits: Mapping[str, Collection[str]], experts: bool) -> list[str]:
        if not experts and not any(splits.values()):
            return []
        backbone = self._backbone()
        return suite_faults(self._suite, backbone.shapes, splits, None if experts else (), backbone.activation)

    def _proxy_faults(self) -> list[str]:
        """Faults of where the proxies come from that concern no single task."""
        split, tasks = self._proxies.split, self._suite.tasks.values()
        if self._proxies.source is None:
            known = sorted({name for task in tasks for name in task.data})
            if split in known or split == VAL:
                return []
            return [f"proxies.split: no task has a split {split}{closest(split, known)}; they have {', '.join(known)}"]
        if is_fetched(self._proxies.source):
            return []  # not before everything else is known to be sound
        try:
            self._images.elsewhere()
        except InputError as error:
            return [f"proxies.source: {error}"]
        return []

    def _draw_faults(self, needs: Needs) -> list[str]:
        """Faults of the proxy images themselves, which are drawn to see whether there are any."""
        faults = []
        for task in self._proxy_tasks(needs) if self._proxies.source is None else list(self._suite.tasks)[:1]:
            try:
                self._images.proxy_images(task)
            except InputError as error:
                faults.append(str(error))
        return faults
