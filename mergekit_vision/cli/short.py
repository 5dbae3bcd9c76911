"""Short names of the options that matter; imports nothing heavy."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Short(NamedTuple):
    """A short name of an option.

    Attributes:
        names: the short names, one of them with two dashes.
        full: the option they stand for; parts of it may follow either name, as in ``--merger.rank``.
        value: placeholder of its value.
        text: what it does.
        commands: that have it; all where empty.
        alone: the value that the short name stands for without one.
    """

    names: tuple[str, ...]
    full: str
    value: str
    text: str
    commands: tuple[str, ...] = ()
    alone: str = ""


_RUNNING = ("validate", "test", "predict")
_MERGING = ("merge", *_RUNNING, "tune")
_MERGED = ("add", "drop")

SHORT = (
    Short(("-s", "--suite"), "--suite", "FILE", "suite: backbone, tasks and experts; `demo` comes with the package"),
    Short(("-m", "--merger"), "--model.merger", "NAME", "merging method; --merger.rank 8 sets its parameter rank", _MERGING),
    Short(("--merged",), "--model.merged", "DIR", "a model merged before, instead of --merger", (*_RUNNING, *_MERGED)),
    Short(("--mergers",), "--mergers", "LIST", "methods to compare: '[TIES, ESM]'; all without --variants", ("compare",)),
    Short(("--variants",), "--variants", "FILE", "methods with parameters, and what else differs by row (YAML)", ("compare",)),
    Short(("--seeds",), "--seeds", "N", "draws of proxy images to average over; 1 unless given", ("compare",)),
    Short(("--grid",), "--grid", "MAPPING", "parameters and their values: '{rank: [8, 16], other: [mean, esd]}'", ("tune",)),
    Short(("--task",), "--task", "NAME", "task whose classes are predicted", ("predict",)),
    Short(("--images",), "--images", "PATH", "directory of images, or one image", ("predict",)),
    Short(
        ("--scale",),
        "--model.scale",
        "VALUE",
        "coefficient: a number, merger (own), search (compare's default) or agreement",
        (*_MERGING, "compare"),
    ),
    Short(
        ("--experts",),
        "--model.experts",
        "LIST",
        "merge the experts of these tasks only: '[mnist, gtsrb]'",
        (*_MERGING, "compare"),
    ),
    Short(("--experts",), "--experts", "LIST", "tasks whose experts join or leave: '[mnist, gtsrb]'", _MERGED),
    Short(("--scale",), "--scale", "NUMBER", "coefficient; the model's own unless given", _MERGED),
    Short(
        ("--keep-state",),
        "--model.keep_state",
        "N",
        "keep what add and drop need, for N experts that may leave; 0 without N",
        ("merge",),
        "0",
    ),
    Short(
        ("--route",),
        "--model.route",
        "RULE",
        "dynamic models: router, oracle (the true task's expert) or base",
        (*_MERGING, "compare"),
    ),
    Short(
        ("--expert-dtype",),
        "--model.expert_dtype",
        "DTYPE",
        "dynamic models: store the experts' factors as float32 or, in half the bytes, bfloat16",
        (*_MERGING, "compare"),
    ),
    Short(("--proxies",), "--data.proxies.n", "N", "unlabeled proxy images a task; --proxies.split and others set the rest"),
    Short(("--tasks",), "--data.tasks", "LIST", "evaluate these tasks only", ("validate", "test", "compare")),
    Short(("--devices",), "--trainer.devices", "N", "processes of a machine, one a device"),
    Short(("--precision",), "--trainer.precision", "KIND", "of evaluation: 32-true, bf16-mixed or 16-mixed"),
    Short(
        ("--allow-code",),
        "--data.allow_code",
        "",
        "import classes that a suite or a merged model names: trust it first",
        alone="true",
    ),
    Short(("--no-verify",), "--model.verify", "", "use a merged model whose files were changed", (*_RUNNING, *_MERGED), "false"),
    Short(("-o", "--output"), "--output", "DIR", "directory of everything that is written; runs/latest unless given"),
)

_PARTS = {"--data.proxies.n": "--data.proxies"}  # what parts follow: --proxies.split is --data.proxies.split


def expanded(arguments: Sequence[str], command: str = "") -> list[str]:
    """Arguments with short names written out, as they are meant in a command.

    >>> from mergekit_vision.cli.short import expanded
    >>> expanded(["-m", "ESM", "--merger.rank=8", "--proxies.split", "train"])
    ['--model.merger', 'ESM', '--model.merger.rank=8', '--data.proxies.split', 'train']
    """
    known = {name: short for short in sorted(SHORT, key=lambda short: command in short.commands) for name in short.names}
    return [_expanded(argument, known, following) for argument, following in pairwise([*arguments, ""])]


def _expanded(argument: str, known: Mapping[str, Short], following: str) -> str:
    word, equals, value = argument.partition("=")
    name, dot, parts = word.partition(".")
    if name not in known:
        return argument
    full, alone = known[name].full, known[name].alone
    given = bool(re.match(r"[^-]|-\d", following)) if alone.isdigit() else following in ("true", "false")
    if alone and not dot and not equals and (alone == "false" or not given):
        return f"{full}={alone}"
    return f"{_PARTS.get(full, full)}.{parts}{equals}{value}" if dot else f"{full}{equals}{value}"


def summary(command: str) -> str:
    """The options that matter to a command, a line each."""
    lines = []
    for short in SHORT:
        if not short.commands or command in short.commands:
            names = ", ".join(short.names) if len(short.names) > 1 else f"    {short.names[0]}"
            lines.append(f"  {f'{names} {short.value}':<25}{short.text}")
    return "\n".join(["options that matter:", *lines])


def shortened(text: str) -> str:
    """A message with options by their short names, as most people type them.

    >>> from mergekit_vision.cli.short import shortened
    >>> shortened("set --model.verify to false, or give --model.merger.rank and --data.proxies.n")
    'give --no-verify, or give --merger.rank and --proxies'
    """
    text = re.sub(r"set (--[\w.]+) to (true|false)", _flag, text)
    return re.sub(r"--[a-z][\w.]*\w", lambda option: _short(option[0]), text)


def _flag(setting: re.Match[str]) -> str:
    """The short option that stands for a setting, of a model or of a command that has it too, where there is one."""
    option, value = setting.groups()
    ours = (short.names[-1] for short in SHORT if short.alone == value and short.full in (option, f"--model.{option[2:]}"))
    flag = next(ours, None)
    return f"give {flag}" if flag else setting[0]


def _short(option: str) -> str:
    """The short name of an option; one that is itself the opposite of the option's name is none."""
    for short in SHORT:
        if option == short.full and short.alone != "false":
            return short.names[-1]
        if "." in short.full and option.startswith(f"{_PARTS.get(short.full, short.full)}."):
            return option.replace(_PARTS.get(short.full, short.full), short.names[-1], 1)
    return option
