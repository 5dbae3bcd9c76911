"""The commands and the program's help."""

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise

from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import closest_file
from mergekit_vision.support.paths import expanded

COMMANDS = {
    "merge": "merge the experts of a suite into one encoder and write it as a directory",
    "add": "have experts join a merged model, without the files of the others",
    "drop": "have experts leave a merged model, without the files of the others",
    "validate": "evaluate a merged encoder on every task's val split",
    "test": "evaluate a merged encoder on every task's test split",
    "predict": "classify images with a merged encoder and one task's classes",
    "compare": "merge with many methods, evaluate them all and write a report",
    "tune": "choose a method's parameters without labels, by agreement with the experts",
}
"""Commands that run a trainer; its methods of these names."""

OTHER_COMMANDS = {
    "methods": "list the installed merging methods",
    "suites": "list the published suites that come with the package, and what each needs",
    "plan": "show what a run on a suite would download, take and need, and every fault of the suite",
    "fetch": "download everything that a suite needs, so that it runs offline",
    "inspect": "show what a checkpoint holds, and whether it can be an expert",
    "export": "write a merged model for transformers, peft, open_clip, ONNX or torch.export",
    "push": "upload a merged model to the Hugging Face hub",
    "doctor": "check the installation and the machine, by merging the demo too",
}
"""Commands that run none, and have options of their own."""

_NUMBERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "PL_GLOBAL_SEED")
_OF_TORCHRUN = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")

HELP = f"""usage: mergekit-vision COMMAND --suite SUITE.yaml [options]

Merge fine-tuned CLIP vision encoders without training, and evaluate the result.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in {**COMMANDS, **OTHER_COMMANDS}.items())}

options:
  -h, --help   this text; COMMAND --help lists a command's options
  --version    print the version
  --debug      with any command: show the traceback of an error

example:
  mergekit-vision test --suite suite.yaml --merger ESM --scale search --output runs/esm
"""


def check_command(arguments: list[str]) -> None:
    """Refuse what is no command.

    Raises:
        InputError: when the first argument is none.
    """
    first, known = arguments[0], [*COMMANDS, *OTHER_COMMANDS]
    if first in known:
        return
    command = next((word for word in arguments if word in known), None)
    if first.startswith("-") and command:
        rest = " ".join(word for word in arguments if word != command)
        raise InputError(f"options come after the command, {first} too: mergekit-vision {command} {rest}")
    if first.startswith("-"):
        line = f"mergekit-vision COMMAND {' '.join(arguments)}"
        raise InputError(f"{first}: not a command; begin with one, {line}; the commands are {', '.join(known)}")
    near = get_close_matches(first, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise InputError(f"{first}: not a command{hint}; the commands are {', '.join(known)}")


def check_variables() -> None:
    """Refuse variables of the environment that Lightning reads as numbers, some when it is imported, and that are none.

    Raises:
        InputError: for the first that is none.
    """
    names = _NUMBERS + (_OF_TORCHRUN if "TORCHELASTIC_RUN_ID" in os.environ else ())
    for name, value in ((name, os.environ.get(name)) for name in names):
        if value is not None and not re.fullmatch("[0-9]{1,10}", value):
            raise InputError(f"the environment variable {name} is {value!r:.40}, but must be a whole number; correct or unset it")


def check_suite_file(arguments: Sequence[str]) -> None:
    """Refuse a suite file that is not there, before seconds are spent on imports; what else is wrong is found later.

    Raises:
        InputError: when one is named that does not exist, and neither help nor a configuration file may make it irrelevant.
    """
    options = [argument.partition("=")[0] for argument in arguments]
    if any(option in ("-h", "-c", "--config", "--print_config") or option.endswith("help") for option in options):
        return
    for argument, following in pairwise([*arguments, ""]):
        option, equals, value = argument.partition("=")
        value = value if equals else following
        if option in ("-s", "--suite") and re.search(r"\.ya?ml$", value) and not os.path.lexists(file := expanded(value)):
            raise InputError(f"{file.absolute()}: cannot be read (no such file){closest_file(file)}")
