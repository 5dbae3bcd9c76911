"""The images of a suite: its splits, each opened once, and the proxy images drawn from them."""

from collections.abc import Sequence

from mergekit_vision.data.proxies import Proxies
from mergekit_vision.errors import InputError
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.checks import content_faults
from mergekit_vision.sources.config import resolve
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.faults import closest
from mergekit_vision.support.json_files import to_json


class SuiteImages:
    """Opens the splits of a suite on demand, and keeps them open.

    Args:
        suite: whose images.
        proxies: which images are proxies.
    """

    def __init__(self, suite: Suite, proxies: Proxies) -> None:
        self.suite, self.proxies = suite, proxies
        self._sources: dict[tuple[str, str], ImageSource] = {}

    def with_proxies(self, proxies: Proxies) -> "SuiteImages":
        """The same images with other proxies among them; what is open, and what either of the two opens, serves both."""
        other = SuiteImages(self.suite, proxies)
        other._sources = self._sources
        return other

    def split(self, task: str, split: str) -> ImageSource:
        """One split of one task. What had to be fetched first can only be checked now.

        Raises:
            InputError: when there is no such split, it cannot be opened, or its classes are others than the task's.
        """
        if (task, split) not in self._sources:
            path, known = self.suite.path, self.suite.tasks[task]
            if split not in known.data:
                raise InputError(
                    f"{path}: task {task} has no split {split}{closest(split, known.data)}; it has {', '.join(known.data)}"
                )
            source = open_source(known.data[split], allow_code=self.suite.allow_code)
            if faults := content_faults(source, known.data_classes, known.named_by_data):
                raise InputError(f"{path}: tasks.{task}.data.{split}: {'; '.join(faults)}")
            self._sources[task, split] = source
        return self._sources[task, split]

    def commit(self, task: str, split: str) -> str | None:
        """The hub's commit that an open split is from, where it is known."""
        source = self._sources.get((task, split))
        return None if source is None else source.commit

    def elsewhere(self) -> ImageSource:
        """The one out-of-domain source that all tasks' proxy images are drawn from."""
        if self.proxies.source is None:
            raise ValueError("the proxy images come from the suite's own splits")
        config, labeled = resolve(self.proxies.source, self.suite.root), self.proxies.label is not None
        key = "", to_json([config, labeled])
        if key not in self._sources:
            self._sources[key] = open_source(config, labeled, self.suite.allow_code)
        return self._sources[key]

    def proxy_images(self, task: str) -> tuple[ImageSource, Sequence[int]]:
        """Where a task's proxy images are, and which they are.

        Raises:
            InputError: when there are none.
        """
        own = self.proxies.source is None
        try:
            source = self.split(task, self.proxies.split) if own else self.elsewhere()
            return source, self.proxies.draw(source)
        except InputError as error:
            where = f"proxy images of task {task}" if own else "proxies.source"
            raise InputError(f"{where}: {error}") from error
