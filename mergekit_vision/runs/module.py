"""The LightningModule: merges in ``setup``, evaluates every task."""

import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mergekit_vision.checkpoints import CheckpointWeights, open_weights
from mergekit_vision.data import VisionTasks
from mergekit_vision.encoder import Backbone, VisionEncoder, describe, load_clip, merged_weights
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation import TaskMetric
from mergekit_vision.export import load_experts, read_record, save_model
from mergekit_vision.figures import draw_routing, save_png
from mergekit_vision.heads import build_heads
from mergekit_vision.layers import LowRankExperts, Route
from mergekit_vision.merger import Merger, Weights
from mergekit_vision.parallel import Team
from mergekit_vision.predictions import Predictions
from mergekit_vision.progress import track
from mergekit_vision.results import describe_merger, own_expert_shares, print_table, same, summarise, versions, write_json
from mergekit_vision.scaling import ScaleSearch
from mergekit_vision.workbench import ScaleChoice, Workbench

SPLITS = {"validate": "val", "test": "test"}

_ONE_OF = "give one of --model.merger NAME (merge now) and --model.merged DIR (a model merged before)"


class MergedCLIP(LightningModule):
    """A CLIP vision encoder merged from a suite's experts, with a zero-shot head for each task.

    Merging happens in ``setup``, on every process, before the strategy takes the model over. The trainer's data module must be a
    :class:`~mergekit_vision.data.VisionTasks`.

    Args:
        merger: the merging method. ``compare`` alone does without: it has methods of its own.
        merged: directory of a model merged before, instead of ``merger``.
        scale: scaling coefficient of the merged task vector: a number, ``merger`` for the method's own, or ``search`` to choose
            it by the mean normalised accuracy on the ``val`` split.
        search: how ``search`` goes about it.
        experts: tasks whose experts are merged; all by default. Every task is evaluated all the same.
        route: how a dynamic model chooses its experts: by its ``router``, by the true task (``oracle``, the ceiling), or not at
            all (``base``).

    Raises:
        InputError: when the arguments contradict each other.
    """

    def __init__(
        self,
        merger: Merger | None = None,
        merged: str | None = None,
        scale: float | Literal["merger", "search"] = "merger",
        search: ScaleSearch = ScaleSearch(),  # noqa: B008 (frozen)
        experts: list[str] | None = None,
        route: Route = "router",
    ) -> None:
        super().__init__()
        if isinstance(scale, float) and not math.isfinite(scale):
            raise InputError(f"--model.scale {scale}: must be a finite number")
        if merger is not None and merged is not None:
            raise InputError(_ONE_OF)
        if merged is not None and scale != "merger":
            raise InputError("--model.scale goes with --model.merger; a merged model's coefficient is in its weights")
        self.merger, self.merged = merger, None if merged is None else Path(merged)
        self.scale, self.search, self.expert_names, self.route = scale, search, experts, route
        self.encoder: VisionEncoder | None = None
        self.record: dict[str, Any] = {}
        self.expert_accuracy: dict[str, dict[str, float | None]] = {}
        self.predictions: Predictions | None = None
        self.comparison: Callable[[Workbench], None] | None = None
        self._has_experts = True
        self._started = 0.0

    @property
    def data(self) -> VisionTasks:
        """The trainer's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, VisionTasks):
            raise InputError("MergedCLIP needs a VisionTasks as the trainer's datamodule")
        return data

    # ---------------------------------------------------------------------------------------------- merging

    @property
    def extra_splits(self) -> set[str]:
        """Splits that merging reads besides the evaluated one; the data module fetches them."""
        if self.merger is None:
            return set()
        compared = ["test"] if self.comparison is not None else []
        return {self.data.proxies.split, *(["val"] if self.scale == "search" else []), *compared}

    def setup(self, stage: str) -> None:
        """Check the suite whole, then merge (or load), and measure the experts on the split that is evaluated."""
        if self.merger is None and self.merged is None:
            raise InputError(_ONE_OF)
        if self.comparison is not None:
            self._check("test")
            self.comparison(self._workbench())
            return
        split = SPLITS.get(stage)
        if split is None and self.encoder is not None:
            return
        self._check(split)
        if self.encoder is None or (split and split not in self.expert_accuracy):
            self._build(split)
        if split is not None:
            self.metrics = nn.ModuleList(TaskMetric() for _ in self.data.task_names)

    def _check(self, split: str | None) -> None:
        """Find what is wrong with the suite before any long work starts."""
        merging, data = self.merger is not None, self.data
        searched = {"val"} if merging and self.scale == "search" else set()
        self._has_experts = merging or self._everywhere(all(task.expert.is_file() for task in data.suite.tasks.values()))
        data.check({split} if split else set(), everywhere=searched, experts=self._has_experts, proxies=merging)
        if merging:
            self.experts()
        elif self.merged is not None:
            read_record(self.merged)
            self._check_merged(describe(f"local-dir:{self.merged}"))
        largest = max((data.size(task, split) for task in data.task_names), default=0) if split else None
        if largest is not None and largest < self.trainer.world_size:
            raise InputError(f"--trainer.devices: {self.trainer.world_size} processes for {largest} images; take fewer")

    def _everywhere(self, value: bool) -> bool:
        """The first process's answer, so that all of them go the same way."""
        return bool(self.trainer.strategy.broadcast(value))

    def _check_merged(self, merged: Backbone) -> None:
        suite = self.data.suite
        backbone = describe(suite.backbone, suite.pretrained)
        if merged.shapes != backbone.shapes or not same(merged.preprocess, backbone.preprocess):
            raise InputError(f"{self.merged}: merged from another backbone than that of {suite.path} ({suite.backbone})")

    def _build(self, split: str | None) -> None:
        """Merge or load, measure the experts that normalise, and leave the merged weights in the encoder."""
        bench = self._workbench()
        if self.encoder is None:
            weights, routed = self.merge_with(bench, self.merger) if self.merger is not None else self._load(bench)
        if split is not None:
            tasks = track(self.data.task_names, f"experts' own accuracy on {split}")
            self.expert_accuracy[split] = {task: self._expert_accuracy(bench, task, split) for task in tasks}
        if self.encoder is not None:  # merged for an earlier stage
            return
        bench.encoder.assign(weights)
        bench.encoder.route(routed)
        self.encoder, self.heads = bench.encoder.eval(), bench.heads
        if self.encoder.routing is not None:
            self.encoder.routing.mode = self.route
        elif self.route != "router":
            raise InputError(f"--model.route {self.route}: a static model has no routed experts; merge with ESMPP or SMILE")

    def _workbench(self) -> Workbench:
        """The backbone (or the model merged before) on the device, with the heads of all tasks."""
        import open_clip

        suite = self.data.suite
        name, pretrained = (suite.backbone, suite.pretrained) if self.merged is None else (f"local-dir:{self.merged}", None)
        backbone, clip = describe(name, pretrained), load_clip(name, pretrained)
        prompts = {task.name: (task.classes, task.templates) for task in suite.tasks.values()}
        strategy, precision = self.trainer.strategy, self.trainer.precision_plugin
        device = strategy.root_device
        heads = build_heads(clip, open_clip.get_tokenizer(name), prompts, backbone.model, device)
        encoder = VisionEncoder(clip.visual).to(device)  # type: ignore[arg-type]
        return Workbench(
            backbone,
            encoder,
            encoder.weights(),
            heads.to(device),
            self.data,
            device,
            Team(self.trainer.global_rank, self.trainer.world_size, strategy.broadcast),
            precision.forward_context,
            str(precision.precision),
        )

    def experts(self) -> dict[str, CheckpointWeights]:
        """The experts that are merged, by task; lazy."""
        tasks = self.data.suite.tasks
        names = list(tasks) if self.expert_names is None else self.expert_names
        unknown = [name for name in names if name not in tasks]
        if unknown or not names:
            raise InputError(f"--model.experts {unknown or names}: name some of the suite's tasks, {', '.join(tasks)}")
        return {name: open_weights(tasks[name].expert) for name in names}

    def _expert_accuracy(self, bench: Workbench, task: str, split: str) -> float | None:
        """The expert's own accuracy; ``None`` where a model merged before is evaluated without its experts at hand."""
        return bench.expert_accuracy(task, split, open_weights(self.data.suite.tasks[task].expert)) if self._has_experts else None

    def _load(self, bench: Workbench) -> tuple[Weights, Mapping[str, LowRankExperts]]:
        assert self.merged is not None
        self.record = read_record(self.merged)
        return bench.base, load_experts(self.merged)

    def merge_with(self, bench: Workbench, merger: Merger) -> tuple[Weights, Mapping[str, LowRankExperts]]:
        """Merge once, choose the coefficient, and leave in ``record`` what was done; the merged weights and routed experts."""
        experts = self.experts()
        choice = ScaleChoice(bench, experts, self.scale, self.search)
        start = time.perf_counter()
        merged = bench.merge(merger, experts, choice)
        seconds = time.perf_counter() - start - choice.seconds
        scale = choice(merged)
        suite = self.data.suite
        self.record = {
            "suite": suite.name,
            "backbone": suite.backbone,
            "pretrained": suite.pretrained,
            "experts": {task: os.path.relpath(weights.path, suite.path.parent) for task, weights in experts.items()},
            "merger": describe_merger(merger),
            "scale": scale,
            "search": sorted(choice.curve, key=lambda row: row["coefficient"]),
            "seconds": {"merge": round(seconds, 3), "search": round(choice.seconds, 3)},
            "versions": versions(),
        }
        return merged_weights(bench.base, merged, scale), merged.routed

    def save(self, directory: Path) -> None:
        """Write the merged model (see :func:`~mergekit_vision.export.save_model`)."""
        assert self.encoder is not None
        suite = self.data.suite
        save_model(directory, describe(suite.backbone, suite.pretrained), self.encoder, self.record)

    # ------------------------------------------------------------------------------------------- evaluation

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Logits ``[N, classes]`` of preprocessed images ``[N, 3, H, W]`` for one task."""
        logits: Tensor = self.heads(self._merged_encoder(images), task)
        return logits

    @property
    def _merged_encoder(self) -> VisionEncoder:
        assert self.encoder is not None, "merged in setup()"
        return self.encoder

    def on_test_start(self) -> None:
        """Start the clock, and count what the router of a dynamic model chooses."""
        self._started = time.perf_counter()
        if (routing := self._merged_encoder.routing) is not None:
            routing.record(self.route == "router")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count one batch of one task."""
        images, labels = batch
        task = self.data.task_names[dataloader_idx]
        if (routing := self._merged_encoder.routing) is not None:
            merged = list(self.record["experts"])
            routing.truth = torch.full_like(labels, merged.index(task)) if task in merged else None
        self.metrics[dataloader_idx].update(self(images, task), labels)  # type: ignore[operator]

    def on_test_epoch_end(self) -> None:
        """Print the table and write ``results.json`` into the trainer's root directory."""
        self._report("test")

    on_validation_start = on_test_start
    validation_step = test_step

    def on_validation_epoch_end(self) -> None:
        """Print the table and write ``results.json`` into the trainer's root directory."""
        self._report("val")

    def _report(self, split: str) -> None:
        sizes = {task: self.data.size(task, split) for task in self.data.task_names}
        # on all processes and in one order, also on those that had no image of a task
        pairs = zip(self.metrics, sizes.items(), strict=True)
        accuracy: dict[str, float] = {task: metric.compute(size) for metric, (task, size) in pairs}  # type: ignore[operator]
        self.log_dict({f"accuracy/{task}": value for task, value in accuracy.items()}, sync_dist=True)
        counts = self.routing_counts(self._merged_encoder)
        if not self.trainer.is_global_zero:
            return
        seconds = {**self.record.get("seconds", {}), "eval": round(time.perf_counter() - self._started, 3)}
        results = {
            **{key: self.record.get(key) for key in ("suite", "merger", "scale", "search")},
            "split": split,
            "route": None if self._merged_encoder.routing is None else self.route,
            **summarise(accuracy, self.expert_accuracy[split], sizes),
            "seconds": seconds,
            "versions": self.record.get("versions"),
        }
        path = Path(self.trainer.default_root_dir) / "results.json"
        if counts:
            results["routing"] = own_expert_shares(counts, list(self.record["experts"]))
            if results["routing"]:
                save_png(draw_routing(results["routing"]), path.with_name("routing.png"))
        write_json(path, results)
        merger, scale = self.record.get("merger", {}).get("name"), self.record.get("scale")
        route = f", route {self.route}" if self.route != "router" else ""
        print_table(results, f"{merger} at coefficient {scale:g}{route} on {split} → {path}")

    def routing_counts(self, encoder: VisionEncoder) -> dict[str, Tensor]:
        """Which expert the images of each task took in each routed layer, over all processes."""
        counts = {} if encoder.routing is None else encoder.routing.counts
        return {layer: self.trainer.strategy.reduce(count, reduce_op="sum").cpu() for layer, count in counts.items()}

    # ------------------------------------------------------------------------------------------- prediction

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Classify one batch of images of a folder: probabilities ``[N, classes]``."""
        assert self.predictions is not None
        images, indices = batch
        probabilities: Tensor = self(images, self.predictions.task).softmax(-1)
        self.predictions.add(indices, probabilities)
        return probabilities
