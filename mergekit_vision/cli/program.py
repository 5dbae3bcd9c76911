"""The command line: a LightningCLI over :class:`MergedCLIP`, :class:`VisionTasks` and :class:`Trainer`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from mergekit_vision import registry
from mergekit_vision.cli.commands import COMMANDS
from mergekit_vision.cli.messages import Parser, explain
from mergekit_vision.cli.options import check_options, import_mergers, merger_names, method_first
from mergekit_vision.cli.short import expanded
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.errors import InputError
from mergekit_vision.export.manifest import RECORD
from mergekit_vision.runs.module import MergedCLIP
from mergekit_vision.runs.trainer import Trainer
from mergekit_vision.support.console import console_output, quiet_lightning
from mergekit_vision.support.files import replacing


class SaveConfig(SaveConfigCallback):
    """Writes the configuration once a run has succeeded, beside its results and never over that of a merged model."""

    def setup(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a run that fails leaves no configuration behind."""

    def teardown(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save; Lightning comes here only after a run that did not fail. Models, predictions and reports are not written yet."""
        if trainer.is_global_zero and stage != "predict":
            self.save_config(trainer, pl_module, stage)

    def save_config(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` into the run's directory; ``config-test.yaml`` where that belongs to a merge."""
        directory = Path(trainer.default_root_dir)
        name = (
            f"config-{getattr(stage, 'value', stage)}.yaml"
            if (directory / RECORD).exists() and not _is_merging(trainer)
            else "config.yaml"
        )
        try:
            with replacing(directory / name) as draft:
                self.parser.save(self.config, draft, skip_none=False, overwrite=True, multifile=False)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{directory / name}: cannot be written ({reason}); the run itself is complete") from error


def _is_merging(trainer: lightning.Trainer) -> bool:
    return isinstance(trainer, Trainer) and trainer.merging


class MergeCLI(LightningCLI):
    """``mergekit-vision {merge,add,drop,validate,test,predict,compare,tune}``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of the trainer, each with the arguments that the command line does not show: of a command only its own."""
        return {name: {"model", "datamodule"} for name in COMMANDS if name == sys.argv[1]}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Build the parsers; ``compare`` and ``tune`` choose coefficients, since methods' own suit few parameters."""
        super().setup_parser(*args, **kwargs)
        for command, parser in self._subcommand_parsers.items():
            if scale := {"compare": "search", "tune": "agreement"}.get(command):
                parser.set_defaults({"model.scale": scale})
            cast(Parser, parser).describe(command)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, after what the parser would not explain well has been checked."""
        command, *rest = sys.argv[1:]
        check_options(rest, self._subcommand_parsers[command]._option_string_actions)
        super().parse_arguments(parser, args)
        seed, model = self.config[command]["seed_everything"], self.config[command]["model"]
        if command in ("merge", "tune") and model["merger"] is None and model["merged"] is None:
            raise InputError("name a method: -m NAME (`mergekit-vision methods` lists them)")
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise InputError(f"--seed_everything must lie in 0 to 2**32 - 1, not {seed}")

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser for the program and for each of its commands."""
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="configuration file (YAML) with any of the options")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what model, data and trainer share."""
        parser.add_argument("--suite", type=str, required=True, help="suite file: backbone, tasks and experts (YAML)")
        parser.add_argument("--output", type=str, default="runs/latest", help="directory of everything that is written")
        parser.link_arguments("suite", "data.suite")
        parser.link_arguments("output", "trainer.default_root_dir")

    def after_merge(self) -> None:
        """Save the configuration of a merge, now that the model is there."""
        self._save_config("merge")

    def after_add(self) -> None:
        """Save that of a revision, beside the merge's own."""
        self._save_config("add")

    def after_drop(self) -> None:
        """Likewise."""
        self._save_config("drop")

    def after_predict(self) -> None:
        """Save that of predictions, likewise."""
        self._save_config("predict")

    def after_compare(self) -> None:
        """Save that of a comparison, likewise."""
        self._save_config("compare")

    def after_tune(self) -> None:
        """Save that of a search of parameters, likewise."""
        self._save_config("tune")

    def _save_config(self, command: str) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfig) and self.trainer.is_global_zero:
                callback.save_config(self.trainer, self.model, command)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; what a constructor refuses is the user's mistake."""
        try:
            with _nothing_exits():
                super().instantiate_classes()
        except InputError:
            raise
        except (ValueError, ImportError, MisconfigurationException) as error:
            raise InputError(explain(str(error))) from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command."""
        with _nothing_exits():
            super()._run_subcommand(subcommand)


def run(arguments: list[str]) -> None:
    """Run one command.

    Args:
        arguments: without the program's name.

    Raises:
        InputError: for anything the user can mend.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    arguments = [arguments[0], *method_first(expanded(arguments[1:], arguments[0]))]
    with _process(arguments), console_output(), quiet_lightning():
        registry.mergers()  # their names become values of --model.merger
        import_mergers(merger_names(arguments))
        try:
            MergeCLI(
                MergedCLIP,
                VisionTasks,
                trainer_class=Trainer,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                save_config_callback=SaveConfig,
                save_config_kwargs={"save_to_log_dir": False},
            )
        except MisconfigurationException as error:
            raise InputError(str(error)) from error


@contextmanager
def _nothing_exits() -> Iterator[None]:
    """Turn an attempt to end the program into an error: a run ends with its results, or with a reason.

    Raises:
        InputError: when a method, a data set or a router tries to.
        KeyboardInterrupt: when the user interrupted the run, which Lightning then ends like a failed one.
    """
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise InputError(
            f"the code of a method, a data set or a router ended the run (SystemExit: {error.code}); --debug shows where"
        ) from error


@contextmanager
def _process(arguments: list[str]) -> Iterator[None]:
    """The process's own arguments, with which Lightning starts the other processes of a node, and its import path.

    ``python -m`` puts the working directory first on the path, where a file there would stand in for any module that some library
    looks for. It is left out; :func:`~mergekit_vision.cli.options.import_mergers` alone looks there, last.
    """
    argv, path = sys.argv, sys.path
    here = path[:1] == [""] or (bool(path) and Path(path[0]).absolute() == Path.cwd())
    sys.argv, sys.path = [argv[0], *arguments], path[1:] if here else path.copy()
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path
