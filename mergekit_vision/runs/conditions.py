"""Results kept by content: what they depend on, as text to hash, and where they lie."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from mergekit_vision.checkpoints import CheckpointWeights
from mergekit_vision.encoder import VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.files import cache_dir, fingerprint, replacing
from mergekit_vision.merger import Merger
from mergekit_vision.progress import say
from mergekit_vision.results import describe_merger, to_json, versions
from mergekit_vision.source_code import code_fingerprint
from mergekit_vision.version import __version__
from mergekit_vision.workbench import Workbench

Entry = dict[str, Any]


class Memory:
    """Entries in the cache directory, each a JSON file that is written whole.

    Args:
        share: gives every process the first one's value, so that all of them compute an entry or none.
        writes: whether this process writes, which one does.
    """

    def __init__(self, share: Callable[[Any], Any], writes: bool) -> None:
        self._share, self._writes = share, writes

    def recall(self, conditions: list[str] | None, compute: Callable[[], Entry]) -> Entry:
        """The entry for some conditions, or what ``compute`` finds on all processes together; not kept without conditions."""
        if conditions is None:
            return self._as_read(compute())
        key = hashlib.blake2b("\n".join([__version__, *conditions]).encode(), digest_size=20).hexdigest()
        path = cache_dir() / "comparisons" / f"{key}.json"
        known: Entry | None = None
        if self._writes:
            with suppress(OSError, ValueError):  # not there, or spoilt by something else
                known = dict(json.loads(path.read_text()))
        known = self._share(known)
        if known is not None:
            return known
        found = self._as_read(compute())
        if self._writes:
            try:
                with replacing(path) as draft:
                    draft.write_text(json.dumps(found))
            except OSError as error:  # the other processes wait for this one's next step
                say(f"{path}: cannot be written ({error.strerror}); this result is not kept")
        return found

    @staticmethod
    def _as_read(entry: Entry) -> Entry:
        """The entry as it will be when it is read again."""
        return dict(json.loads(to_json(entry, in_order=True)))


def of_backbone(bench: Workbench) -> list[str]:
    """The backbone's weights and preprocessing, and the libraries that run it."""
    content = hashlib.blake2b(digest_size=32)
    for key, value in sorted(bench.base.items()):
        content.update(f"{key} {tuple(value.shape)}".encode())
        content.update(_bytes(value))
    return [to_json([versions(), dict(bench.backbone.model), dict(bench.backbone.preprocess)]), content.hexdigest()]


def of_evaluation(bench: Workbench, split: str) -> list[str]:
    """The images of all tasks that are evaluated, the heads of all there are (a search needs them too), and the precision."""
    data = bench.data
    heads = {task: hashlib.blake2b(_bytes(bench.heads.weight(task)), digest_size=32).hexdigest() for task in data.suite.tasks}
    code = code_fingerprint([Workbench, VisionEncoder]) or ""
    return [
        code,
        bench.device.type,
        bench.precision_name,
        to_json(heads),
        to_json({task: data.fingerprint(task, split) for task in data.task_names}),
    ]


def of_experts(bench: Workbench, experts: Mapping[str, CheckpointWeights]) -> list[str]:
    """The weights of experts that are merged, in their order, and their proxy images."""

    def proxies(task: str) -> str:
        with suppress(InputError):
            return bench.data.proxy_fingerprint(task)
        return "none"

    return [to_json([[task, fingerprint(weights.path), proxies(task)] for task, weights in experts.items()])]


def of_merger(merger: Merger) -> list[str] | None:
    """A method, its parameters and its source code; ``None`` where the code cannot be read."""
    code = code_fingerprint(_classes(merger))
    return None if code is None else [to_json(describe_merger(merger)), code]


def _classes(merger: Merger) -> Iterator[type]:
    yield type(merger)
    for value in vars(merger).values():
        if isinstance(value, Merger):
            yield from _classes(value)


def _bytes(value: Tensor) -> bytes:
    return bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
