"""The command line: a LightningCLI over :class:`MergedCLIP`, :class:`VisionTasks` and :class:`Trainer`."""

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import lightning
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from mergekit_vision import registry
from mergekit_vision.__main__ import COMMANDS
from mergekit_vision.data import VisionTasks
from mergekit_vision.errors import InputError
from mergekit_vision.export import RECORD
from mergekit_vision.files import replacing
from mergekit_vision.module import MergedCLIP
from mergekit_vision.trainer import Trainer


class Parser(LightningArgumentParser):
    """An argument parser whose errors are one message and not the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse what cannot be parsed.

        Raises:
            InputError: always.
        """
        raise InputError(explain(message))


class SaveConfig(SaveConfigCallback):
    """Writes the configuration once a run has succeeded, beside its results and never over that of a merged model."""

    def setup(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a run that fails leaves no configuration behind."""

    def teardown(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save; Lightning comes here only after a run that did not fail."""
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)

    def save_config(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` into the run's directory; ``config-test.yaml`` where that belongs to a merge."""
        directory = Path(trainer.default_root_dir)
        merging = isinstance(trainer, Trainer) and trainer.merging
        name = f"config-{stage}.yaml" if (directory / RECORD).exists() and not merging else "config.yaml"
        with replacing(directory / name) as draft:
            self.parser.save(self.config, draft, skip_none=False, overwrite=True, multifile=False)


class MergeCLI(LightningCLI):
    """``mergekit-vision {merge,validate,test,predict,compare}``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Methods of the trainer, each with the arguments that the command line does not show."""
        return {name: {"model", "datamodule"} for name in COMMANDS}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Build the parsers; ``compare`` searches coefficients by default, as methods' own are not chosen for one another."""
        super().setup_parser(*args, **kwargs)
        self._subcommand_parsers["compare"].set_defaults({"model.scale": "search"})

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

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; what a constructor refuses is the user's mistake."""
        try:
            super().instantiate_classes()
        except InputError:
            raise
        except (ValueError, ImportError, MisconfigurationException) as error:
            raise InputError(explain(str(error))) from error


def run(arguments: list[str]) -> None:
    """Run one command.

    Args:
        arguments: without the program's name.

    Raises:
        InputError: for anything the user can mend.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    sys.argv[1:] = arguments  # Lightning starts the other processes of a node with them
    sys.path.append(str(Path.cwd()))  # a class path may name a file beside the user, as with `python -m`
    registry.mergers()  # their names become values of --model.merger
    _check_merger(arguments)
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
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning ends an interrupted run like a failed one
            raise KeyboardInterrupt from error
        raise


def explain(message: str) -> str:
    r"""The part of a jsonargparse message that helps.

    >>> explain("Parser key \"suite\":\n  Expected a <class 'str'>. Got value: None")
    '--suite is missing'
    """
    key = re.search(r'(?:Parser key|Key) "([\w.]+)"', message)
    option = f"--{key[1]}" if key else ""
    if key and re.search(r"Got value: None|is required", message):
        return f"{option} is missing"
    reasons = re.findall(r"^ +- (.*)$", message.partition("Given value")[0], flags=re.MULTILINE)
    reasons = [reason for reason in reasons if "NoneType" not in reason and "Expected a path" not in reason]
    text = "; ".join(reasons) or message.partition(":\n")[2].strip() or message
    return f"{option}: {text}" if option else text


def _check_merger(arguments: list[str]) -> None:
    """Name the methods there are before the parser says less about a misspelt one."""
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name = value if argument == "--model.merger" else argument.removeprefix("--model.merger=")
        if name != argument and re.fullmatch(r"\w+(\.\w+)*", name) and not name.endswith((".yaml", ".yml", ".json")):
            registry.get(name)
