"""The LightningModule: merges in ``setup``, evaluates every task."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.encoders.routed import Route
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.evaluation.metric import TaskMetric
from mergekit_vision.export.directory import check_tokenizer, load_experts, save_model
from mergekit_vision.export.manifest import ROUTERS, read_record, weights_of
from mergekit_vision.export.state import State
from mergekit_vision.merger import Merger, Weights
from mergekit_vision.merging.lineage import check_lineage
from mergekit_vision.merging.recipe import MergedModel, Recipe, expert_sources
from mergekit_vision.merging.record import needs_images
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.reports.figures import draw_routing
from mergekit_vision.reports.style import save_png
from mergekit_vision.reports.summary import own_expert_shares, summarize
from mergekit_vision.reports.tables import results_table
from mergekit_vision.routers import ExpertDtype
from mergekit_vision.runs.checks import check_alike, check_is_merge, check_merged, check_processes, check_same_suite
from mergekit_vision.runs.predictions import Predictions
from mergekit_vision.runs.runtime import data_of, runtime_of
from mergekit_vision.suites.expectations import departures
from mergekit_vision.suites.splits import EVALUATED, TEST, VAL
from mergekit_vision.support.console import logger, show, track
from mergekit_vision.support.fingerprints import of_tensors
from mergekit_vision.support.json_files import write_json
from mergekit_vision.support.paths import expanded

_ONE_OF = "give one of `merger` (merge now) and `merged` (the directory of a model merged before)"
_DEFAULT_SEARCH = ScaleSearch()


class MergedCLIP(LightningModule):
    """A CLIP vision encoder merged from a suite's experts, with a zero-shot head for each task.

    Merging happens in ``setup``, on every process, before the strategy takes the model over. The trainer's data module must be a
    :class:`~mergekit_vision.data.datamodule.VisionTasks`.

    Args:
        merger: the merging method. ``compare`` alone does without: it has methods of its own.
        merged: directory of a model merged before, instead of ``merger``.
        scale: scaling coefficient of the merged task vector: a number; ``merger`` for the method's own; ``search`` to choose it
            by the mean normalized accuracy on the ``val`` split; ``agreement`` to choose it without labels, by the agreement
            with the experts on the proxy images.
        search: range and effort of a search.
        experts: tasks whose experts are merged; all by default. Every task is evaluated all the same.
        route: how a dynamic model chooses its experts: by its ``router``, by the true task (``oracle``, the ceiling), or not at
            all (``base``).
        verify: whether the files of ``merged`` must be as they were written, by the checksums in its ``merge.json``.
        keep_state: keep beside the model what the trainer's ``add`` and ``drop`` need, for so many experts that may leave it;
            ``None`` for nothing.
        expert_dtype: how the low-rank factors of a dynamic model's experts are kept in memory and in its files; ``bfloat16``
            rounds them once they are merged, to half the bytes.

    Attributes:
        encoder: the merged encoder, once it is set up.
        record: what was merged and how.
        expert_accuracy: split -> task -> accuracy of the task's own expert, where it was measured.

    Raises:
        InputError: when the arguments contradict each other.
    """

    def __init__(
        self,
        merger: Merger | None = None,
        merged: str | None = None,
        scale: float | Literal["merger", "search", "agreement"] = "merger",
        search: ScaleSearch = _DEFAULT_SEARCH,
        experts: list[str] | None = None,
        route: Route = "router",
        verify: bool = True,
        keep_state: int | None = None,
        expert_dtype: ExpertDtype = "float32",
    ) -> None:
        super().__init__()
        chosen = None if experts is None else tuple(experts)
        self.recipe = Recipe(scale, search, chosen, route, keep_state, expert_dtype)
        if merger is not None and merged is not None:
            raise InputError(_ONE_OF, of="model")
        if merged == "":
            raise InputError("`merged` is empty; name the directory of a merged model", of="model")
        if merged is not None and scale != "merger":
            raise InputError("`scale` goes with `merger`; a merged model's coefficient is in its weights", of="model")
        if merged is not None and experts is not None:
            raise InputError("`experts` goes with `merger`; a merged model has those that it was merged from", of="model")
        if merged is not None and keep_state is not None:
            raise InputError("`keep_state` goes with `merger`; add and drop keep what the model has", of="model")
        if merged is not None and expert_dtype != "float32":
            raise InputError("`expert_dtype` goes with `merger`; a merged model's experts are as they were stored", of="model")
        self.merger, self.merged = merger, None if merged is None else expanded(merged)
        self.verify = verify
        self.encoder: VisionEncoder | None = None
        self.record: dict[str, Any] = {}
        self.expert_accuracy: dict[str, dict[str, float | None]] = {}
        self._evaluator: Evaluator | None = None
        self._text: Weights = {}
        self._kept: Weights | None = None
        self._predictions: Predictions | None = None
        self._has_experts = True
        self._started = 0.0

    @property
    def data(self) -> VisionTasks:
        """The trainer's data module."""
        return data_of(self.trainer)

    # ---------------------------------------------------------------------------------------------- merging

    def prepare_data(self) -> None:
        """Download what will be read, in one process of each machine before the others look for it."""
        split = EVALUATED.get(str(self.trainer.state.fn))
        self._check_arguments(split)
        self.data.fetch(self._needs(split, experts=self.merger is not None))

    def setup(self, stage: str) -> None:
        """Check the suite whole, then merge (or load), and measure the experts on the split that is evaluated."""
        split = EVALUATED.get(stage)
        self._check_arguments(split)
        if self._evaluator is not None:  # whose heads and experts stay
            check_same_suite(self.data.suite, self._evaluator.data.suite)
        if split is None and self._predictions is None and self.encoder is not None:
            return
        self._check(split)
        if getattr(self.trainer, "merging", False):  # what is merged will be written
            backbone = describe_backbone(self.data.suite.backbone, self.data.suite.pretrained)
            check_tokenizer(Path(self.trainer.default_root_dir), backbone)
        if self.encoder is None:
            self._build()
        if split is not None or self._predictions is not None:
            self._prepare_evaluation(split)

    def _evaluated_tasks(self, split: str | None) -> Sequence[str]:
        if split is not None:
            return self.data.task_names
        return () if self._predictions is None else (self._predictions.task,)

    def _needs(self, split: str | None, experts: bool) -> Needs:
        evaluated = frozenset({split} if split else ())
        return Needs(evaluated, experts=experts) if self.merger is None else self.recipe.needs(evaluated, [self.merger])

    def _check_arguments(self, split: str | None) -> None:
        """Refuse what needs no download to be found wrong."""
        if self.merger is not None:
            check_is_merge(self.merger)
            self.recipe.check_keeping(self.data.suite, self.merger)
            self.recipe.check_routed(dynamic=self.merger.kind == "dynamic")
            self.recipe.check_truth(self.recipe.tasks(self.data.suite), self._evaluated_tasks(split))
        elif self.merged is None:
            raise InputError(_ONE_OF, of="model")
        else:
            read_record(self.merged, verify=False)

    def _check(self, split: str | None) -> None:
        """Find what is wrong with the suite before any long work starts."""
        data, merging = self.data, self.merger is not None
        here = not any(task.expert.missing for task in data.suite.tasks.values())
        # the first process's answer, so that all of them go the same way
        self._has_experts = merging or bool(self.trainer.strategy.broadcast(here))
        needs = self._needs(split, self._has_experts)
        data.check(needs)
        team = runtime_of(self.trainer).team
        check_alike(data, needs, team)
        if self._predictions is not None:
            self._predictions.check_alike(team)
        if self.merged is not None:
            record = check_merged(self.merged, data.suite, self.verify)
            if ROUTERS in record.get("files", {}):
                self.recipe.check_truth(record["experts"], self._evaluated_tasks(split))
        if split is not None:
            check_processes(self.trainer.world_size, max((data.size(task, split) for task in data.task_names), default=0))

    def _build(self) -> None:
        """Merge or load, and leave the merged model in the encoder."""
        bench = Workbench.open(self.data, runtime_of(self.trainer), self.merged)
        model = self._merged_model(bench)
        encoder = bench.evaluator.encoder
        encoder.assign(model.weights)
        encoder.route(model.routed, self.recipe.route)
        self.recipe.check_routed(dynamic=encoder.routing is not None)
        self.encoder, self.record = encoder.eval(), model.record
        self._evaluator = replace(bench.evaluator, experts=tuple(model.record["experts"]))
        self._text = bench.text if self.trainer.is_global_zero else {}
        self._kept = model.kept if self.trainer.is_global_zero else None
        if self.merger is not None and self.trainer.is_global_zero:  # who revises the model is to have the same backbone
            self.record = {**self.record, "base": of_tensors(bench.base)}

    def _merged_model(self, bench: Workbench) -> MergedModel:
        if self.merger is not None:
            check_lineage(self.recipe.chosen(self.data.suite), bench.base, bench.evaluator.encoder.linears)
            return self.recipe.merge(bench, self.merger)
        if self.merged is None:
            raise InputError(_ONE_OF, of="model")
        routed = load_experts(self.merged, self.data.suite.allow_code)
        record = read_record(self.merged, verify=False)  # verified before
        for name, experts in routed.items():
            if len(experts.down) != len(record["experts"]):
                problem = f"{name} has {len(experts.down)} experts, but the record names {len(record['experts'])}; merge again"
                raise InputError(f"{self.merged}: {problem}")
        return MergedModel(bench.base, routed, record)

    def save(self, directory: Path) -> None:
        """Write the merged model, from the first process (see :func:`~mergekit_vision.export.directory.save_model`).

        Raises:
            InputError: when nothing is merged yet.
        """
        encoder, suite = self._evaluated.encoder, self.data.suite
        routed = {} if encoder.routing is None else {name: layer.experts for name, layer in encoder.routing.layers.items()}
        backbone = describe_backbone(suite.backbone, suite.pretrained)
        record = self.record
        if self.merger is not None:  # hashing the experts takes long, and only what is written is to vouch for them
            record = {**record, "sources": expert_sources(self.recipe.chosen(suite))}
        save_model(directory, backbone, {**self._text, **encoder.weights()}, routed, record, self._state())

    def _state(self) -> State | None:
        """What goes beside the model for experts that join or leave; nothing where that needs the model alone."""
        if not self._kept:
            if self.recipe.keep_state is not None:
                logger.info("nothing has to be kept: what an expert that joins or leaves needs is in the model")
            return None
        sees = self.merger is not None and needs_images(self.merger)
        return State(self._kept, {task: self.data.proxies_seen(task) for task in self.record["experts"]} if sees else {})

    # ------------------------------------------------------------------------------------------- evaluation

    @property
    def _evaluated(self) -> Evaluator:
        if self._evaluator is None:
            raise InputError("nothing is merged yet; run the model through a trainer's merge, validate, test or predict first")
        return self._evaluator

    def _prepare_evaluation(self, split: str | None) -> None:
        """Put encoder and heads where this trainer runs; measure the split's experts, whose accuracies normalize."""
        self._evaluator = evaluator = replace(self._evaluated, data=self.data, runtime=runtime_of(self.trainer))
        evaluator.encoder.to(evaluator.runtime.device)
        self.heads = evaluator.heads().to(evaluator.runtime.device)
        if split is None:
            return
        known = self._has_experts  # a model merged before may be evaluated without its experts at hand
        tasks = track(self.data.task_names, f"experts' own accuracy on {split}")
        # each time, as the tasks, the images or the precision may be others; what is known is remembered by its content
        self.expert_accuracy[split] = {task: evaluator.expert_accuracy(task, split) if known else None for task in tasks}
        self.metrics = nn.ModuleList(TaskMetric() for _ in self.data.task_names)

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Logits ``[N, classes]`` of preprocessed images ``[N, 3, H, W]`` for one task.

        Raises:
            InputError: when nothing is merged yet.
        """
        evaluator = self._evaluated
        return evaluator.heads()(evaluator.encoder(images), task)  # type: ignore[no-any-return]

    def on_test_start(self) -> None:
        """Start the clock, and count what the router of a dynamic model chooses."""
        self._started = time.perf_counter()
        if (routing := self._evaluated.encoder.routing) is not None:
            routing.record(self.recipe.route == "router")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch of one task."""
        metric = self.metrics[dataloader_idx]
        self._evaluated.step(metric, *batch, self.data.task_names[dataloader_idx])  # type: ignore[arg-type]

    def on_test_epoch_end(self) -> None:
        """Show the table and write ``results.json`` into the trainer's root directory."""
        self._report(TEST)

    on_validation_start = on_test_start
    validation_step = test_step

    def on_validation_epoch_end(self) -> None:
        """Show the table and write ``results.json`` into the trainer's root directory."""
        self._report(VAL)

    def _report(self, split: str) -> None:
        sizes = {task: self.data.size(task, split) for task in self.data.task_names}
        # on all processes and in one order, also on those that had no image of a task
        pairs = zip(self.metrics, sizes.items(), strict=True)
        accuracy: dict[str, float] = {task: metric.accuracy(size) for metric, (task, size) in pairs}  # type: ignore[operator]
        self.log_dict({f"accuracy/{task}": value for task, value in accuracy.items()}, sync_dist=True)
        counts = self._evaluated.routing_counts()
        if self.trainer.is_global_zero:
            self._write(split, summarize(accuracy, self.expert_accuracy[split], sizes), counts)

    def _write(self, split: str, summary: Mapping[str, Any], counts: Mapping[str, Tensor]) -> None:
        """Write ``results.json`` and ``routing.png``, and show the table."""
        encoder, route = self._evaluated.encoder, self.recipe.route
        results = {
            "kind": "evaluation",
            "schema": 1,
            **{key: self.record.get(key) for key in ("suite", "experts", "merger", "scale", "search")},
            **{key: self.record[key] for key in ("history", "expert_dtype") if self.record.get(key)},
            **({"weights": weights} if (weights := weights_of(self.record)) else {}),
            "split": split,
            "hub": self.data.hub_sources(split),
            "route": None if encoder.routing is None else route,
            **summary,
            "seconds": {**self.record.get("seconds", {}), "eval": round(time.perf_counter() - self._started, 3)},
            "versions": self.record.get("versions"),
        }
        path = Path(self.trainer.default_root_dir) / "results.json"
        if counts:
            results["routing"] = own_expert_shares(counts, list(self.record["experts"]))
            if results["routing"]:
                labels = {linear.name: f"{linear.block} {linear.kind}" for linear in encoder.linears}
                save_png(draw_routing(results["routing"], labels), path.with_name("routing.png"))
        write_json(path, results)
        merger, scale = self.record.get("merger", {}), self.record.get("scale")
        name = merger.get("recipe", merger.get("name"))  # models merged before had no recipe
        how = f", route {route}" if route != "router" else ""
        how += ", experts in bfloat16" if self.record.get("expert_dtype") == "bfloat16" else ""
        for text in departures(self.data.suite.tasks.values(), self.expert_accuracy[TEST]) if split == TEST else ():
            logger.warning(text)
        show(results_table(results, f"{name} at coefficient {scale:g}{how} on {split} → {path}"))

    # ------------------------------------------------------------------------------------------- prediction

    def predict_for(self, predictions: Predictions | None) -> None:
        """Say what the next prediction is of; ``None`` for no images, so that the model is only set up."""
        self._predictions = predictions

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Classify one batch of images of a folder: probabilities ``[N, classes]``.

        Raises:
            InputError: when no task was named; the trainer's ``predict`` does.
        """
        if self._predictions is None:
            raise InputError("no task to predict; use mergekit_vision.Trainer, whose predict takes one")
        images, indices = batch
        self._evaluated.tell(self._predictions.task, images)
        probabilities: Tensor = self(images, self._predictions.task).softmax(-1)
        self._predictions.add(indices, probabilities)
        return probabilities

    def teardown(self, stage: str) -> None:
        """Gather predictions: Lightning runs no other hook on a process without images, and none after an error."""
        if self._predictions is not None:
            self._predictions.gather(runtime_of(self.trainer).team)
