"""Lightning's Trainer with the subcommands of the command line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.loader import explained_workers
from mergekit_vision.errors import InputError
from mergekit_vision.export.directory import check_output
from mergekit_vision.export.manifest import STATE
from mergekit_vision.registry import default_mergers
from mergekit_vision.reports.html import write_comparison
from mergekit_vision.reports.tuning import write_tuning
from mergekit_vision.runs.checks import check_place
from mergekit_vision.runs.comparison import Comparison
from mergekit_vision.runs.launcher import end_together
from mergekit_vision.runs.memory import explained_memory, settings_of
from mergekit_vision.runs.module import MergedCLIP
from mergekit_vision.runs.predictions import Predictions
from mergekit_vision.runs.processes import check_devices, check_slurm, check_started, cpu_devices
from mergekit_vision.runs.revision import Revision
from mergekit_vision.runs.tuning import Tuning
from mergekit_vision.runs.variant_files import read_variants
from mergekit_vision.sources.folder import FlatFolder
from mergekit_vision.support.console import console, logger, quiet_lightning
from mergekit_vision.support.faults import closest
from mergekit_vision.support.paths import expanded

Accuracies = list[Mapping[str, float]]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


class Trainer(lightning.Trainer):
    """Lightning's Trainer without what only training needs, and with methods for the commands that it does not have.

    Args:
        accelerator: ``cpu``, ``gpu``, …; ``auto`` takes the best there is.
        strategy: how processes work together; ``auto`` is right for evaluation.
        devices: how many devices of a node, which, or ``auto`` for all.
        num_nodes: number of machines.
        precision: of evaluation's forward passes; ``bf16-mixed`` is faster on a GPU. Merging is not affected. At any
            of them PyTorch is told, for the whole process, not to use TF32 in convolutions.
        logger: where accuracies are logged besides ``results.json``.
        callbacks: Lightning callbacks.
        profiler: ``simple``, ``advanced`` or a Lightning profiler.
        default_root_dir: directory of everything that is written (the command line's ``--output``).
        enable_progress_bar: a bar on a terminal; never where the output is no terminal.
    """

    merging = False

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: Precision = "32-true",
        logger: Logger | list[Logger] | bool = False,
        callbacks: list[Callback] | Callback | None = None,
        profiler: Profiler | str | None = None,
        default_root_dir: str = "runs/latest",
        enable_progress_bar: bool = True,
    ) -> None:
        check_place(default_root_dir)
        check_devices(devices)
        check_slurm()
        bar = enable_progress_bar and console.is_terminal
        chosen = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        with quiet_lightning(), cpu_devices(devices):
            super().__init__(
                accelerator=accelerator,
                strategy=strategy,
                devices=devices,
                num_nodes=num_nodes,
                precision=precision,
                logger=logger,
                callbacks=[*chosen, *([RichProgressBar()] if bar else [])],
                profiler=profiler,
                default_root_dir=default_root_dir,
                enable_progress_bar=bar,
                enable_checkpointing=False,
                enable_model_summary=False,
                use_distributed_sampler=False,  # the data module's own sampler repeats no image
            )
        # the patch embedding would otherwise have 10 bits on CUDA, of proxy images at any precision
        torch.backends.cudnn.allow_tf32 = False
        check_started(self.world_size)
        end_together(self.strategy)

    def merge(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Merge the experts of a suite into one encoder and write it as a directory.

        open_clip loads the directory as ``local-dir:DIRECTORY``; ``test --model.merged DIRECTORY`` evaluates it.
        """
        model = cast(MergedCLIP, model)
        if model.merger is None:
            raise InputError("merge needs `merger`; what `merged` names is merged already", of="model")
        output = Path(self.default_root_dir)
        check_output(output)
        self.merging = True
        with self._explained("merging", model, datamodule):
            self._set_up_only(model, datamodule)
            if self.is_global_zero:
                model.save(output)
        if self.is_global_zero:
            dynamic = model.encoder is not None and model.encoder.routing is not None
            reads = "mergekit_vision.load reads it; open_clip reads its static base only" if dynamic else "open_clip reads it too"
            logger.info("merged model: %s (%s, as local-dir:%s)", output, reads, output)
            self._tell_of_state(output)
            self._tell_of_results(output)

    def add(  # noqa: D417 (the CLI hides the others)
        self, model: LightningModule, datamodule: LightningDataModule, experts: list[str], scale: float | None = None
    ) -> None:
        """Have experts join a merged model, without the files of the others, and write the new model as a directory.

        Exactly, up to rounding, where the method's sums are in the model or the model has a state (``keep_state`` of ``merge``);
        by the rule of OPCM otherwise. The model's own directory is replaced in one step.

        Args:
            experts: tasks of the suite whose experts join.
            scale: scaling coefficient; that of the model unless given.
        """
        self._revise(self._revision(model, "add", joining=experts, scale=scale), datamodule)

    def drop(  # noqa: D417 (the CLI hides the others)
        self, model: LightningModule, datamodule: LightningDataModule, experts: list[str], scale: float | None = None
    ) -> None:
        """Have experts leave a merged model, without the files of the others, and write the new model as a directory.

        A sum needs the files of the experts that leave it; what a state was kept for (``keep_state`` of ``merge``) does not.

        Args:
            experts: tasks of the model whose experts leave.
            scale: scaling coefficient; that of the model unless given.
        """
        self._revise(self._revision(model, "drop", leaving=experts, scale=scale), datamodule)

    def _revision(self, model: LightningModule, command: str, **changes: Any) -> Revision:
        model = cast(MergedCLIP, model)
        if model.merged is None:
            raise InputError(f"{command} needs `merged`, the directory of a model merged before", of="model")
        return Revision(model.merged, **changes, verify=model.verify)

    def _revise(self, revision: Revision, datamodule: LightningDataModule) -> None:
        output = Path(self.default_root_dir)
        check_output(output)
        with self._explained("merging", revision, datamodule):
            self._set_up_only(revision, datamodule)
            if self.is_global_zero:
                revision.save(output)
        if self.is_global_zero and revision.model is not None:
            experts = revision.model.record["experts"]
            logger.info("merged model of %d experts: %s (open_clip reads it as local-dir:%s)", len(experts), output, output)
            self._tell_of_state(output)
            self._tell_of_results(output)

    def _tell_of_state(self, output: Path) -> None:
        if (state := output / STATE).exists():
            logger.info("%s: %.1f MB, kept for experts that join or leave", state, state.stat().st_size / 1e6)

    def _tell_of_results(self, output: Path) -> None:
        if (old := output / "results.json").exists():
            logger.info("%s was there before: it is not about this model until `test` has run again", old)

    def validate(self, model: LightningModule, datamodule: LightningDataModule) -> Accuracies:  # type: ignore[override]
        """Evaluate a merged encoder on every task's val split."""
        with quiet_lightning(), self._explained("evaluating", model, datamodule):
            return super().validate(model, datamodule=datamodule, verbose=False)

    def test(self, model: LightningModule, datamodule: LightningDataModule) -> Accuracies:  # type: ignore[override]
        """Evaluate a merged encoder on every task's test split."""
        with quiet_lightning(), self._explained("evaluating", model, datamodule):
            return super().test(model, datamodule=datamodule, verbose=False)

    def predict(  # type: ignore[override]  # noqa: D417 (the CLI hides the others)
        self, model: LightningModule, datamodule: LightningDataModule, task: str, images: str, top: int = 3
    ) -> None:
        """Classify the images of a folder with a merged encoder and one task's zero-shot head.

        Args:
            task: task of the suite whose classes are predicted.
            images: a directory of images, or one image.
            top: how many classes are written for each image.
        """
        model, datamodule = cast(MergedCLIP, model), cast(VisionTasks, datamodule)
        tasks = datamodule.suite.tasks
        if task not in tasks:
            raise InputError(f"`task` {task}: not in the suite{closest(task, tasks)}; it has {', '.join(tasks)}", of="command")
        if top < 1:
            raise InputError(f"`top` {top}: at least one class must be written", of="command")
        folder = FlatFolder(expanded(images))
        predictions = Predictions(task, tasks[task].classes, folder.paths, top)
        model.predict_for(predictions)
        datamodule.predict_on(folder)
        try:
            with quiet_lightning(), self._explained("predicting", model, datamodule):
                super().predict(model, datamodule=datamodule, return_predictions=False)
        finally:
            model.predict_for(None)
            datamodule.predict_on(None)
        if self.is_global_zero:
            predictions.write(Path(self.default_root_dir) / "predictions.csv")

    def compare(  # noqa: D417 (the CLI hides the others)
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        mergers: list[str] | str | None = None,
        variants: str | None = None,
        seeds: int = 1,
    ) -> None:
        """Merge with many methods, evaluate each on every task's test split, and write a report.

        What was measured once is remembered: another run measures only what is new. ``results.json``, pictures and
        ``report.html`` are written.

        Args:
            mergers: names or class paths of methods, with their default parameters; ``all``, the default without ``variants``,
                for every installed one.
            variants: a file (YAML) that lists methods with parameters, and what else differs from row to row.
            seeds: draws of the proxy images, over which a method that sees them is averaged.
        """
        model = cast(MergedCLIP, model)
        if model.merger is not None or model.merged is not None:
            raise InputError("compare merges by methods of its own: give it neither `merger` nor `merged`", of="model")
        if variants is not None and not variants.strip():
            raise InputError("`variants` is empty; name a file", of="command")
        chosen = "all" if mergers is None and variants is None else mergers
        methods = {} if chosen is None else default_mergers(chosen)
        rows = [] if variants is None else read_variants(expanded(variants))
        comparison = Comparison(model.recipe, methods, lenient=chosen in ("all", ["all"]), variants=rows, seeds=seeds)
        with self._explained("comparing", comparison, datamodule):
            self._set_up_only(comparison, datamodule)
        if self.is_global_zero:
            write_comparison(comparison.results, Path(self.default_root_dir))

    def tune(  # noqa: D417 (the CLI hides the others)
        self, model: LightningModule, datamodule: LightningDataModule, grid: dict[str, list[Any]]
    ) -> None:
        """Choose a method's parameters without labels: those with which the merged model agrees best with the experts.

        Every combination is merged once; what was judged once is remembered. ``results.json``, ``tuning.png`` and
        ``winner.yaml``, a configuration file for ``merge``, are written.

        Args:
            grid: parameters and the values to try, every combination of them; ``base.rank`` is the parameter ``rank`` of the
                method that is the parameter ``base``.
        """
        model = cast(MergedCLIP, model)
        if model.merger is None:
            raise InputError("tune needs `merger`; what `merged` names is merged already", of="model")
        tuning = Tuning(model.recipe, model.merger, grid)
        with self._explained("tuning", tuning, datamodule):
            self._set_up_only(tuning, datamodule)
        if self.is_global_zero:
            write_tuning(tuning.results, Path(self.default_root_dir))

    @contextmanager
    def _explained(self, work: str, model: LightningModule, data: LightningDataModule) -> Iterator[None]:
        """Say in one line what the machine lacks."""
        device = self.strategy.root_device
        sharing = self.num_devices if device.type == "cpu" else 1
        known = cast(MergedCLIP | Comparison | Tuning | Revision, model), cast(VisionTasks, data)
        with explained_memory(work, device, lambda: settings_of(*known), sharing), explained_workers():
            yield

    def _set_up_only(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Set a module up on every process, where it does its work, and run nothing else: there are no images to predict."""
        with quiet_lightning():
            super().predict(model, datamodule=datamodule, return_predictions=False)
