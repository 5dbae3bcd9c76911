"""What is merged and how, apart from the method."""

import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

from mergekit_vision.checkpoints import Expert
from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.routed import Route
from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, Merger, Weights, merged_weights
from mergekit_vision.merging.coefficient import Scale, ScaleChoice
from mergekit_vision.merging.record import citations, merger_record, needs_images, parameter_fault, revisable
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.routers import ExpertDtype, LowRankExperts
from mergekit_vision.suites.splits import VAL
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.console import track
from mergekit_vision.support.faults import repeated
from mergekit_vision.support.fingerprints import remembered_sha256
from mergekit_vision.support.source_code import versions
from mergekit_vision.support.tensors import FINITE, LARGEST, unusable


class MergedModel(NamedTuple):
    """A merged model, ready to be run.

    Attributes:
        weights: of the vision tower.
        routed: Linear name -> its routed experts; empty for a static model.
        record: what was merged and how, as ``merge.json`` keeps it.
        oracle: what an oracle made, which cannot be run as one model; ``None`` for a model that can.
        kept: name -> tensor of what experts that join or leave the model later need; ``None`` where nothing was to be kept.
    """

    weights: Weights
    routed: Mapping[str, LowRankExperts]
    record: dict[str, Any]
    oracle: Merged | None = None
    kept: Weights | None = None


@dataclass(frozen=True)
class Recipe:
    """What is merged and how, apart from the method; for a single merge and for a comparison of many.

    Attributes:
        scale: scaling coefficient of the merged task vector: a number; ``merger`` for the method's own; ``search``, by accuracy
            on ``val``; ``agreement``, by that with the experts on unlabeled proxy images.
        search: range and effort of a search.
        experts: tasks whose experts are merged; all of the suite where ``None``.
        route: how a dynamic model chooses its experts.
        keep_state: how many experts are to be able to leave the model later, where what that needs is kept; else ``None``.
        expert_dtype: what the factors of a dynamic model's experts are rounded to, once the method has returned them.

    Raises:
        InputError: when ``scale`` is neither a number that weights can be multiplied by nor one of the words, ``expert_dtype`` is
            not one of its two, or ``keep_state`` is below 0.
    """

    scale: Scale = "merger"
    search: ScaleSearch = field(default_factory=ScaleSearch)
    experts: tuple[str, ...] | None = None
    route: Route = "router"
    keep_state: int | None = None
    expert_dtype: ExpertDtype = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.scale, str) and self.scale not in ("merger", "search", "agreement"):
            raise InputError(f"`scale` is {self.scale!r}, but must be a number, merger, search or agreement", of="model")
        if not isinstance(self.scale, str) and not -LARGEST <= self.scale <= LARGEST:
            raise InputError(
                f"`scale` is {self.scale}, but must be a finite number, of magnitude {LARGEST:.0f} at most", of="model"
            )
        if self.expert_dtype not in get_args(ExpertDtype):
            raise InputError(f"`expert_dtype` is {self.expert_dtype!r}, but must be float32 or bfloat16", of="model")
        if self.keep_state is not None and self.keep_state < 0:
            raise InputError(f"`keep_state` is {self.keep_state}, but must be 0 or more experts that may leave", of="model")

    def check_routed(self, dynamic: bool) -> None:
        """Refuse a rule of routing, or a dtype of experts, for a model that routes nothing."""
        given = (("route", self.route, "router"), ("expert_dtype", self.expert_dtype, "float32"))
        for name, value, usual in given if not dynamic else ():
            if value != usual:
                problem = "a static model has no routed experts; merge with ESMPP or SMILE"
                raise InputError(f"`{name}` {value}: {problem}", of="model")

    def check_truth(self, merged: Collection[str], evaluated: Iterable[str]) -> None:
        """Refuse to route each image to its task's own expert where some tasks that are evaluated have none in the model.

        Args:
            merged: tasks whose experts a dynamic model has.
            evaluated: tasks to evaluate.

        Raises:
            InputError: naming the tasks without one.
        """
        lacking = [task for task in evaluated if task not in merged]
        if self.route == "oracle" and lacking:
            problem = f"the experts of {', '.join(lacking)} are not merged, to which their images would go"
            remedy = f"evaluate other tasks (`data.tasks` [{', '.join(merged)}]), or merge with these too (`model.experts`)"
            raise InputError(f"`model.route` oracle: {problem}; {remedy}", of="command")

    @property
    def searched(self) -> frozenset[str]:
        """Splits that the coefficient is searched on."""
        return frozenset({VAL} if self.scale == "search" else ())

    def needs(self, evaluated: frozenset[str] = frozenset(), mergers: Iterable[Merger] = ()) -> Needs:
        """What merging with some methods, and evaluating on some splits, reads of a suite."""
        proxies = self.scale == "agreement" or any(map(needs_images, mergers))
        judged = self.experts if proxies else ()
        return Needs(evaluated, everywhere=self.searched, proxies=proxies, judged=judged, merged=self.experts)

    def tasks(self, suite: Suite) -> list[str]:
        """The tasks whose experts are merged.

        Raises:
            InputError: when one is not the suite's, or is named twice.
        """
        names = list(suite.tasks) if self.experts is None else list(self.experts)
        unknown = [name for name in names if name not in suite.tasks]
        if unknown or not names:
            remedy = f"name some of the suite's tasks, {', '.join(suite.tasks)}"
            raise InputError(f"`experts` {unknown or names}: {remedy}", of="model")
        if twice := repeated(names):
            raise InputError(f"`experts`: {twice[0]} is named twice; no expert can be merged with itself", of="model")
        return names

    def chosen(self, suite: Suite) -> dict[str, Expert]:
        """The experts that are merged, by task; lazy.

        Raises:
            InputError: as :meth:`tasks`, or when an expert cannot be opened.
        """
        return {name: suite.experts[name] for name in self.tasks(suite)}

    def check_keeping(self, suite: Suite, merger: Merger) -> None:
        """Refuse to keep what no method could use.

        Raises:
            InputError: when the method merges all experts at once, a record cannot tell how it was set, or more experts are to
                leave than may.
        """
        if self.keep_state is None:
            return
        if (fault := parameter_fault(merger)) is not None:
            raise InputError(f"`keep_state`: {fault}", of="model")
        if revisable(merger) == "no":
            problem = "merges all experts at once, so that keeping anything of them is of no use; leave it out"
            raise InputError(f"`keep_state`: {merger_record(merger)['recipe']} {problem}", of="model")
        if self.keep_state >= (count := len(self.tasks(suite))):
            problem = f"of {count} experts, {count - 1} can leave at most"
            raise InputError(f"`keep_state` {self.keep_state}: {problem}", of="model")

    def merge(self, bench: Workbench, merger: Merger, judging: Workbench | None = None) -> MergedModel:
        """Merge once and choose the coefficient; every process does, and all get the same.

        Args:
            bench: with the proxy images that the method sees.
            merger: the method.
            judging: with those that the coefficient is chosen by; ``bench`` unless given.
        """
        suite = bench.evaluator.data.suite
        experts = self.chosen(suite)
        choice = ScaleChoice(judging or bench, list(experts), self.scale, self.search)
        start = time.perf_counter()
        merged = bench.merge(merger, {task: bench.evaluator.expert(task) for task in experts}, choice, self.keep_state)
        seconds = time.perf_counter() - start - choice.seconds
        merged = self._rounded(merged)
        scale = choice(merged)
        record = {
            "suite": suite.name,
            "backbone": suite.backbone,
            "pretrained": suite.pretrained,
            "experts": expert_paths(suite, experts),
            "datasets": hub_datasets(suite, experts),
            "merger": merger_record(merger),
            "citation": citations(merger),
            "scale": scale,
            **({"expert_dtype": self.expert_dtype} if merged.routed else {}),
            "search": sorted(choice.curve, key=lambda row: row["coefficient"]),
            "seconds": {"merge": round(seconds, 3), "search": round(choice.seconds, 3)},
            "versions": versions(),
        }
        weights = merged_weights(bench.base, merged, scale, release=not merged.experts)  # an oracle is kept whole
        check_usable(weights, merged.routed, f"{type(merger).__name__} at coefficient {scale:g}")
        kept = None if self.keep_state is None else merged.kept
        return MergedModel(weights, merged.routed, record, merged if merged.experts else None, kept)

    def _rounded(self, merged: Merged) -> Merged:
        """What a method returned, with its routed experts in the dtype that they are searched, evaluated and stored in."""
        routed = {name: experts.rounded(self.expert_dtype) for name, experts in merged.routed.items()}
        return replace(merged, routed=routed) if routed else merged


def halves(data: VisionTasks, mergers: Iterable[Merger]) -> tuple[VisionTasks, VisionTasks]:
    """The data with the proxy images that some methods see, and with those that they are judged by, which none has seen.

    Raises:
        InputError: when only one image a task is asked for; a source with one raises it when it is drawn from.
    """
    fits = any(map(needs_images, mergers))
    seen, judged = data.proxies.halves() if fits else (data.proxies, data.proxies)
    return data.variant(seen, data.task_names), data.variant(judged, data.task_names)


def check_usable(weights: Weights, routed: Mapping[str, LowRankExperts], what: str) -> None:
    """Refuse a merged model that cannot be run, before it is written or evaluated."""
    parts = {f"{name}.{key}": part for name, experts in routed.items() for key, part in experts.tensors().items()}
    faults = [*unusable(weights), *unusable(parts, FINITE)]
    if faults:
        more = f" (and {len(faults) - 1} more such tensors)" if len(faults) > 1 else ""
        raise InputError(f"{what}: {faults[0]}{more}; take a smaller `scale`, or leave out the expert it comes from", of="model")


def expert_sources(experts: Mapping[str, Expert]) -> dict[str, dict[str, Any]]:
    """Task -> what was read of its expert and how, with the SHA-256 of each file."""
    return {
        task: {**experts[task].origin, "sha256": {file.name: remembered_sha256(file) for file in experts[task].files}}
        for task in track(list(experts), "hashing experts")
    }


def expert_paths(suite: Suite, experts: Mapping[str, Expert]) -> dict[str, str]:
    """Task -> its expert as the suite names it: a file or directory, relative to the suite's, or an id of the hub."""
    sources = {task: suite.tasks[task].expert for task in experts}
    return {
        task: str(source) if source.path is None else os.path.relpath(source.path, suite.path.parent)
        for task, source in sources.items()
    }


def hub_datasets(suite: Suite, tasks: Iterable[str]) -> dict[str, str]:
    """Task -> id of its data set on the Hugging Face hub, of the tasks whose data come from there."""
    named = {task: [str(source["hub"]) for source in suite.tasks[task].data.values() if "hub" in source] for task in tasks}
    return {task: names[-1] for task, names in named.items() if names and not Path(names[-1]).is_absolute()}  # else a local copy
