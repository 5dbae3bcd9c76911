"""Runs a command, and says how it ended; imports nothing heavy before it has to."""

import errno
import os
import re
import signal
import sys
import traceback
from contextlib import redirect_stdout
from importlib import import_module
from typing import TextIO, cast

from mergekit_vision.cli.commands import HELP, OTHER_COMMANDS, check_command, check_suite_file, check_variables
from mergekit_vision.cli.short import shortened
from mergekit_vision.cli.signals import Terminated, terminable
from mergekit_vision.errors import FailedElsewhereError, InputError, ProcessLostError
from mergekit_vision.support.terminal import Output, harmless
from mergekit_vision.version import __version__

_PREFIX = {"model": "--model.", "data": "--data.", "trainer": "--trainer.", "command": "--"}
_LINKED = {
    **{"--trainer.default_root_dir": "--output", "--data.suite": "--suite"},
    **{f"--{name}": f"--{name.replace('_', '-')}" for name in ("base_only", "batch_size", "cache_mb")},  # of export and plan
}
_CALLS = {"Trainer.merge": "mergekit-vision merge -o DIR"}  # what a remedy may name in Python, on the command line
_FUNCTIONS = {"methods": "list_methods", "suites": "list_suites"}
"""Commands that run no trainer are modules beside this one; the function of each, where it has not the command's name."""
_MACHINE = {  # what the machine, not the program, fails at: full disks, limits, missing rights, names that no file can have
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENODEV, errno.EMFILE, errno.ENFILE),
    *(errno.ENOENT, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT),  # what others removed meanwhile, and disks elsewhere
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those of the process where ``None``, without the program's name.

    Returns:
        The exit status: 0; 1 after a user's mistake, which is one line on standard error; 70 after an error of the program
        itself, whose traceback is written to a file; 130 after an interruption; 143 after SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    output = Output(sys.stdout)
    with redirect_stdout(cast(TextIO, output)):
        status = _status([argument for argument in arguments if argument != "--debug"], debug)
        output.flush()
    if output.failure is None or isinstance(output.failure, BrokenPipeError):  # who reads has read enough
        return status
    return status or _end(f"standard output: {output.failure.strerror}; files are written all the same", 1, debug=False)


def _status(arguments: list[str], debug: bool) -> int:
    """The exit status of a run, after everything that ended it was said."""
    received = set[int]()
    try:
        with terminable(received):
            return _run(arguments)
    except FailedElsewhereError:
        return 1
    except ProcessLostError as error:  # what has started the processes asks the others to end then
        return _failed(error, debug)
    except (KeyboardInterrupt, Terminated) as error:
        return _asked_to_end(isinstance(error, KeyboardInterrupt))
    except Exception as error:
        if received:
            return _asked_to_end(signal.SIGINT in received)
        return _failed(error, debug)


def _asked_to_end(by_user: bool) -> int:
    """Say that the run was interrupted or terminated; the status."""
    if by_user or os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes of a terminated run are terminated too
        how = "interrupted" if by_user else "terminated"
        print(f"mergekit-vision: {how}; completed results are on disk, no file is partial", file=sys.stderr)
    return 130 if by_user else 143


def _failed(error: Exception, debug: bool) -> int:
    """Say what a run failed at; the status."""
    if isinstance(error, InputError):
        return _end(in_options(error), 1, debug)
    if isinstance(error, OSError) and error.errno in _MACHINE:
        return _end(f"{error.filename or 'a file'}: {error.strerror}", 1, debug)
    first = (str(error).splitlines() or [""])[0]
    what = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return _end(f"{what}; this is a bug, please report it with {_traceback_file()}", 70, debug)


def in_options(error: InputError) -> str:
    """The message of an error with arguments as the options of the command line.

    >>> from mergekit_vision.cli.main import in_options
    >>> from mergekit_vision.errors import InputError
    >>> in_options(InputError("`scale` is inf", of="model"))
    '--scale is inf'
    """
    if error.of is None:
        return shortened(str(error))
    prefix = _PREFIX[error.of]

    def option(name: re.Match[str]) -> str:
        full = f"{prefix}{name[1]}"
        return _CALLS.get(name[1]) or _LINKED.get(full, full)

    return shortened(re.sub(r"(?<!did you mean )`([\w.]+)`", option, str(error)))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"mergekit-vision {__version__}")
        return 0
    check_command(arguments)
    check_variables()
    if (command := arguments[0]) in OTHER_COMMANDS:
        module = import_module(f"mergekit_vision.cli.{command}")
        getattr(module, _FUNCTIONS.get(command, command))(arguments[1:])
    else:
        check_suite_file(arguments[1:])
        from mergekit_vision.cli.program import run

        run(arguments)
    return 0


def _end(message: str, status: int, debug: bool) -> int:
    """Say why a run ends."""
    if debug:
        print(harmless(traceback.format_exc()), file=sys.stderr)
    print(harmless(f"mergekit-vision: error: {message}"), file=sys.stderr)
    return status


def _traceback_file() -> str:
    """Write the traceback at hand to a file of its own, and say where it is."""
    import tempfile

    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="mergekit-vision-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(f"mergekit-vision {__version__}: {' '.join(sys.argv)}\n\n{traceback.format_exc()}")
    except OSError:
        return "what --debug shows"
    return f"the traceback in {file.name} (--debug shows it)"
