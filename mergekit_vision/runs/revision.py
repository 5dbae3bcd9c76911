"""Experts that join or leave a merged model, without the files of those that stay."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file

from mergekit_vision import registry
from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.errors import InputError
from mergekit_vision.export.directory import check_tokenizer, save_model
from mergekit_vision.export.manifest import MODEL, ROUTERS, check_unchanged, read_record
from mergekit_vision.export.state import State, read_state
from mergekit_vision.merger import Former, Merged, Merger, Weights, merged_weights
from mergekit_vision.merging.lineage import check_lineage
from mergekit_vision.merging.recipe import MergedModel, Recipe, check_usable, expert_paths, expert_sources, hub_datasets
from mergekit_vision.merging.record import citations, needs_images, parameter_fault, revisable
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.parts import ByParts
from mergekit_vision.runs.building import recorded_merger
from mergekit_vision.runs.checks import check_alike, check_merged
from mergekit_vision.runs.runtime import data_of, runtime_of
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.console import logger
from mergekit_vision.support.faults import closest, repeated
from mergekit_vision.support.fingerprints import of_tensors, sha256
from mergekit_vision.support.json_files import readable, same
from mergekit_vision.support.source_code import versions

_EPS = torch.finfo(torch.float32).eps
_HIDDEN = 0.01
"""Share of a model's change that may be rounding where its experts' sum is read from its weights."""

Rule = Literal["exact", "OPCM"]
"""How a model is revised: to what merging all experts again would give, up to rounding; or by adding the task vectors that join,
each projected as OPCM does."""


class _Plan(NamedTuple):
    """What is to be done, once it is known to be possible.

    Attributes:
        record: what ``merge.json`` of the model holds.
        merger: the method that revises.
        rule: how.
        state: what was kept.
    """

    record: dict[str, Any]
    merger: Merger
    rule: Rule
    state: State | None


class Revision(LightningModule):
    """Takes experts of a suite into a merged model, or out of it, while it is set up.

    Args:
        merged: directory of the model.
        joining: tasks of the suite whose experts join it.
        leaving: tasks of the model whose experts leave it.
        scale: scaling coefficient; that of the model where ``None``.
        verify: whether the model's files must be as they were written.

    Attributes:
        model: the new model, once it is set up.

    Raises:
        InputError: when ``scale`` is no finite number or 0, or a task is named twice.
    """

    def __init__(
        self,
        merged: Path,
        joining: Sequence[str] = (),
        leaving: Sequence[str] = (),
        scale: float | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__()
        for tasks in (joining, leaving):
            if isinstance(tasks, str):
                raise InputError(f"`experts` {tasks}: must be a list of tasks", of="command")
            if twice := repeated(tasks):
                raise InputError(f"`experts`: {twice[0]} is named twice", of="command")
        if scale is not None and not _is_coefficient(scale):
            raise InputError(f"`scale` {scale}: must be a finite number other than 0", of="command")
        if scale is not None:
            Recipe(scale)  # which refuses numbers beyond all use
        self.merged, self.joining, self.leaving = merged, list(joining), list(leaving)
        self.scale, self.verify = scale, verify
        self.model: MergedModel | None = None
        self._text: Weights = {}

    def prepare_data(self) -> None:
        """Download what will be read, in one process of each machine."""
        self._data.fetch(self._needs)

    def setup(self, stage: str) -> None:
        """Check all that can be checked, then revise the model."""
        data, plan = self._data, self._plan
        check_merged(self.merged, data.suite, self.verify)
        data.check(self._needs)
        check_alike(data, self._needs, runtime_of(self.trainer).team)
        backbone = describe_backbone(data.suite.backbone, data.suite.pretrained)
        check_tokenizer(Path(self.trainer.default_root_dir), backbone)
        bench = Workbench.open(data, runtime_of(self.trainer))
        former = load_file(self.merged / MODEL)
        check_unchanged(self.merged, plan.record)
        self._check_backbone(bench, former, plan.record.get("base"))
        check_lineage({task: data.suite.experts[task] for task in self.joining}, bench.base, bench.evaluator.encoder.linears)
        others = [seen["proxies"] for seen in self._seen.values() if not same(seen["proxies"], asdict(data.proxies))]
        if self.joining and others:
            logger.warning("the experts before were merged with other proxy images: %s", others[0])
        self.model, self._text = self._revised(bench, former, plan), bench.text

    def predict_step(self, *args: Any) -> None:
        """Nothing, as a :class:`~mergekit_vision.runs.comparison.Comparison`'s."""

    def save(self, directory: Path) -> None:
        """Write the new model; over the old one, if that is its directory.

        Raises:
            InputError: when nothing was revised yet, another model was written over the old one meanwhile, or the files cannot be
                written.
        """
        if self.model is None:
            raise InputError("no model was revised yet; run this through a trainer's add or drop")
        suite, model, plan = self._data.suite, self.model, self._plan
        backbone = describe_backbone(suite.backbone, suite.pretrained)
        seen = {task: seen for task, seen in self._seen.items() if task not in self.leaving}
        if self._needs.proxies:
            seen |= {task: self._data.proxies_seen(task) for task in self.joining}
        state = State(model.kept, seen) if model.kept else None
        former = plan.record if directory.resolve() == self.merged.resolve() else None
        save_model(directory, backbone, {**self._text, **model.weights}, {}, model.record, state, former)

    @cached_property
    def _data(self) -> VisionTasks:
        """The trainer's data module with the tasks that come and go, of those that the suite has."""
        return data_of(self.trainer).only([*self.joining, *self.leaving])

    @cached_property
    def _plan(self) -> _Plan:
        """What is to be done; raises an :class:`InputError` where it cannot be."""
        suite, record = data_of(self.trainer).suite, read_record(self.merged, verify=False)
        if ROUTERS in record.get("files", {}):
            raise InputError(f"{self.merged}: is a dynamic model, whose routers are of all experts together; merge again")
        self._check_names(suite, record)
        merger, state = recorded_merger(record["merger"], suite.allow_code), read_state(self.merged, record)
        how = "no" if any(step.get("rule") == "OPCM" for step in record.get("history", ())) else revisable(merger)
        if how == "model" or (how == "state" and state is not None):
            return _Plan(record, merger, "exact", state)
        why = parameter_fault(merger) or f"{record['merger']['name']} merges all experts at once"
        if how == "state":
            why = "nothing was kept of its experts (`keep_state` of merge)"
        if self.leaving:
            raise InputError(f"{self.merged}: no expert can leave, since {why}; merge the others again")
        who = f"{', '.join(self.joining)} {'joins' if len(self.joining) == 1 else 'join'}"
        logger.warning("%s: %s, so that %s by OPCM's rule", self.merged, why, who)
        if self.scale is not None:
            problem = "what joins by OPCM's rule leaves the model's coefficient as it is"
            raise InputError(f"`scale` {self.scale:g}: {problem}", of="command")
        return _Plan(record, registry.get("OPCM")(), "OPCM", None)

    @property
    def _seen(self) -> Mapping[str, Mapping[str, Any]]:
        """Which proxy images the experts in the model ran on, as far as a state tells."""
        return {} if self._plan.state is None else self._plan.state.seen

    @property
    def _needs(self) -> Needs:
        opened = bool(self.joining) or not isinstance(self._plan.merger, ByParts)  # parts leave without their expert
        seen = self._plan.rule == "exact" and needs_images(self._plan.merger)
        return Needs(experts=opened, proxies=seen and opened)

    def _check_names(self, suite: Suite, record: Mapping[str, Any]) -> None:
        merged = record["experts"]
        for task in self.joining:
            if task not in suite.tasks:
                known = ", ".join(suite.tasks)
                raise InputError(f"`experts` {task}: not in the suite{closest(task, suite.tasks)}; it has {known}", of="command")
            if task in merged:
                raise InputError(f"`experts` {task}: is in the model already; drop it first", of="command")
        for task in self.leaving:
            if task not in merged:
                raise InputError(f"`experts` {task}: not in the model; it has {', '.join(merged)}", of="command")
        if not self.joining and not self.leaving:
            raise InputError("`experts`: name at least one task", of="command")
        if len(self.leaving) == len(merged):
            raise InputError("`experts`: at least one expert must stay", of="command")

    def _check_backbone(self, bench: Workbench, former: Weights, hashed: str | None) -> None:
        """Refuse another backbone than the model's, by its text tower, which merging leaves alone, or its vision tower's hash."""
        if any(key not in former or not torch.equal(former[key], value.cpu()) for key, value in bench.text.items()):
            tower = "text"
        else:
            shaped = all(key in former and former[key].shape == value.shape for key, value in bench.base.items())
            if shaped and hashed in (None, of_tensors(bench.base)):  # models of earlier versions have no hash
                return
            tower = "vision"
        suite = self._data.suite
        problem = f"merged from another backbone than that of {suite.path} ({suite.backbone}), by its {tower} tower"
        raise InputError(f"{self.merged}: {problem}")

    def _revised(self, bench: Workbench, former: Weights, plan: _Plan) -> MergedModel:
        """The new model and its record."""
        start, scale = time.perf_counter(), float(plan.record["scale"])
        device = bench.inputs({}).device
        change = {key: former[key].to(device) - value.to(device) for key, value in bench.base.items()}
        if plan.rule == "exact" and plan.state is None and _norm(bench.base) * _EPS > _HIDDEN * _norm(change):
            problem = f"at coefficient {scale:g}, the rounding of its weights hides the experts; merge them again"
            raise InputError(f"{self.merged}: {problem}")
        kept = {name: tensor.to(device, copy=True) for name, tensor in plan.state.tensors.items()} if plan.state else {}
        before = Former(tuple(plan.record["experts"]), change, scale if plan.rule == "exact" else 1.0, kept)
        joining = {task: bench.evaluator.expert(task) for task in self.joining}
        seen = self._seen if needs_images(plan.merger) else {}
        merged: Merged = bench.revise(plan.merger, before, joining, _Leaving(bench, plan.record, self.leaving, seen))
        if self.scale is not None and not merged.scalable:
            name = plan.record["merger"]["name"]
            raise InputError(f"`scale` {self.scale:g}: a model of {name} has no coefficient", of="command")
        scale = scale if self.scale is None else self.scale
        weights = merged_weights(bench.base, merged, scale if plan.rule == "exact" else 1.0, release=True)
        check_usable(weights, {}, f"{plan.record['merger']['name']} at coefficient {scale:g}")
        step = {
            **({"joined": self.joining} if self.joining else {}),
            **({"left": self.leaving} if self.leaving else {}),
            "rule": plan.rule,
            "scale": scale,
            "seconds": round(time.perf_counter() - start, 3),
            "versions": versions(),
        }
        return MergedModel(weights, {}, self._record(plan, scale, step), None, merged.kept)

    def _record(self, plan: _Plan, scale: float, step: Mapping[str, Any]) -> dict[str, Any]:
        """What is recorded of the new model: the merge, and all steps since."""
        suite, old = self._data.suite, plan.record
        found = {name: value for name, value in old.items() if name not in ("files", "sha256", "schema")}
        joining = {task: suite.experts[task] for task in self.joining}
        new: dict[str, dict[str, Any]] = {
            "experts": dict(expert_paths(suite, joining)),
            "datasets": dict(hub_datasets(suite, joining)),
            "sources": expert_sources(joining),
        }
        for name, added in new.items():
            found[name] = {**{task: value for task, value in old.get(name, {}).items() if task not in self.leaving}, **added}
        cited = [*old.get("citation", ()), *(citations(plan.merger) if plan.rule == "OPCM" else ())]
        found["search"] = old["search"] if scale == old["scale"] else []
        return {**found, "citation": list(dict.fromkeys(cited)), "scale": scale, "history": [*old.get("history", ()), step]}


def _norm(weights: Weights) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in weights.values()))


def _is_coefficient(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value != 0


class _Leaving(Mapping[str, Weights]):
    """Experts that leave a model, each opened when a method asks for it: many do not.

    Args:
        bench: opens them.
        record: of the model, with the hashes of the files that it was merged from.
        tasks: that leave.
        seen: task -> which proxy images the method ran it on, where it did.
    """

    def __init__(
        self, bench: Workbench, record: Mapping[str, Any], tasks: Iterable[str], seen: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._bench, self._record, self._tasks, self._seen = bench, record, dict.fromkeys(tasks), seen
        self._opened: dict[str, Weights] = {}

    def __getitem__(self, task: str) -> Weights:
        if task not in self._opened:
            self._opened[task] = self._open(task)
        return self._opened[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def _open(self, task: str) -> Weights:
        data, source = self._bench.evaluator.data, self._record.get("sources", {}).get(task, {})
        suite, recorded = data.suite, source.get("sha256")
        if task not in suite.tasks:
            raise InputError(f"{suite.path}: lacks the task {task}, whose expert is needed to take it out of the model")
        if task in self._seen:
            seen, found = self._seen[task], data.proxies_seen(task)
            name = "images" if seen.get("images") else "proxies"
            if not same(seen[name], found[name]):
                problem = "is taken out of the model by the proxy images that it was merged with, and these are others"
                remedy = f"give the same `proxies` ({readable(seen['proxies'])}), of the same images"
                raise InputError(f"the expert of task {task} {problem}; {remedy}", of="data")
        expert = suite.experts[task]
        if recorded and sorted(recorded.values()) != sorted(sha256(file) for file in expert.files):
            raise InputError(f"the expert of task {task} ({expert.path}) is another file than was merged; name that one")
        for name, option in (("kind", "`kind`"), ("names", "`key` or `ema`"), ("scale", "`scale`")):
            if name in source and not same(source[name], expert.origin.get(name)):
                problem = f"is read with the {name} {expert.origin.get(name)}, but was merged with {source[name]}"
                raise InputError(f"the expert of task {task} ({expert.path}) {problem}; give the same {option} in the suite")
        return self._bench.evaluator.expert(task)
