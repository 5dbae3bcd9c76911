"""Lightning's Trainer with the subcommands of the command line."""

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import lightning
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from mergekit_vision.data import VisionTasks
from mergekit_vision.errors import InputError
from mergekit_vision.export import check_output
from mergekit_vision.module import MergedCLIP
from mergekit_vision.predictions import Predictions
from mergekit_vision.progress import console, say
from mergekit_vision.sources import FlatFolder, closest

Accuracies = list[Mapping[str, float]]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


class Trainer(lightning.Trainer):
    """Lightning's Trainer without what only training needs: ``merge``, ``validate``, ``test``, ``predict`` and ``compare``.

    Args:
        accelerator: ``cpu``, ``gpu``, …; ``auto`` takes the best there is.
        strategy: how processes work together; ``auto`` is right for evaluation.
        devices: how many devices of a node, which, or ``auto`` for all.
        num_nodes: number of machines.
        precision: of evaluation's forward passes; ``bf16-mixed`` is faster on a GPU. Merging is not affected.
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
        _quiet()
        _check_place(Path(default_root_dir))
        bar = enable_progress_bar and console.is_terminal
        chosen = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
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

    def merge(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Merge the experts of a suite into one encoder and write it as a directory.

        open_clip loads the directory as ``local-dir:DIRECTORY``; ``test --model.merged DIRECTORY`` evaluates it.
        """
        model = cast(MergedCLIP, model)
        if model.merger is None:
            raise InputError("merge needs --model.merger NAME; what --model.merged names is merged already")
        output = Path(self.default_root_dir)
        check_output(output)
        self.merging = True
        # no images to predict: the model is set up on every process, which merges, and nothing else runs
        super().predict(model, datamodule=datamodule, return_predictions=False)
        if self.is_global_zero:
            model.save(output)
            dynamic = model.encoder is not None and model.encoder.routing is not None
            reads = "mergekit_vision.load reads it; open_clip reads its static base only" if dynamic else "open_clip reads it too"
            say(f"merged model: {output} ({reads}, as local-dir:{output})")
            if (output / "results.json").exists():
                say(f"{output / 'results.json'} was there before: it is not about this model until `test` has run again")

    def validate(self, model: LightningModule, datamodule: LightningDataModule) -> Accuracies:  # type: ignore[override]
        """Evaluate a merged encoder on every task's val split."""
        return super().validate(model, datamodule=datamodule, verbose=False)

    def test(self, model: LightningModule, datamodule: LightningDataModule) -> Accuracies:  # type: ignore[override]
        """Evaluate a merged encoder on every task's test split."""
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
            raise InputError(f"--task {task}: not a task of the suite{closest(task, tasks)}; it has {', '.join(tasks)}")
        if top < 1:
            raise InputError(f"--top {top}: at least one class must be written")
        folder = FlatFolder(images)
        model.predictions = Predictions(task, tasks[task].classes, folder.paths, top)
        datamodule.images = folder
        super().predict(model, datamodule=datamodule, return_predictions=False)
        # here and not in a hook: Lightning runs none on a process without images
        model.predictions.gather()
        if self.is_global_zero:
            model.predictions.write(Path(self.default_root_dir) / "predictions.csv")

    def compare(  # noqa: D417 (the CLI hides the others)
        self, model: LightningModule, datamodule: LightningDataModule, mergers: list[str] | str = "all"
    ) -> None:
        """Merge with many methods, evaluate each on every task's test split, and write a report.

        What was measured once is remembered: another run measures only what is new. ``results.json``, pictures and
        ``report.html`` are written.

        Args:
            mergers: names or class paths of methods, with their default parameters; ``all`` for every installed one.
        """
        from mergekit_vision.compare import Comparison, chosen_mergers
        from mergekit_vision.report import write_comparison

        model = cast(MergedCLIP, model)
        if model.merger is not None or model.merged is not None:
            raise InputError("compare takes its methods from --mergers, not from --model.merger or --model.merged")
        methods = chosen_mergers(mergers)
        comparison = Comparison(model, methods, lenient=mergers in ("all", ["all"]))
        # any of them: what is checked and fetched before merging is the same for all
        model.merger, model.comparison = next(iter(methods.values())), comparison
        try:
            # no images to predict: the model is set up on every process, which compares, and nothing else runs
            super().predict(model, datamodule=datamodule, return_predictions=False)
        finally:
            model.merger = model.comparison = None
        if self.is_global_zero:
            write_comparison(comparison.results, Path(self.default_root_dir))


def _check_place(directory: Path) -> None:
    nearest = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise InputError(f"--output {directory}: {nearest} is a file; name a directory")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"--output {directory}: {nearest} cannot be written to; name another directory")


def _quiet() -> None:
    """Keep Lightning's remarks on training, devices and its other products out of runs that do not train."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*across ranks is zero.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)
