"""Runs a command, and says how it ended; imports nothing heavy before it has to."""

import re
import sys
import traceback

from mergekit_vision.cli.commands import HELP, check_command
from mergekit_vision.errors import InputError
from mergekit_vision.version import __version__

_PREFIX = {"model": "--model.", "data": "--data.", "trainer": "--trainer.", "command": "--"}
_LINKED = {"--trainer.default_root_dir": "--output", "--data.suite": "--suite", "--base_only": "--base-only"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those of the process where ``None``, without the program's name.

    Returns:
        The exit status: 0; 1 after a user's mistake, which is one line on standard error; 70 after an error of the program
        itself, whose traceback is written to a file; 130 after an interruption.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        return _run([argument for argument in arguments if argument != "--debug"])
    except InputError as error:
        return _end(in_options(error), 1, debug)
    except KeyboardInterrupt:
        print("mergekit-vision: interrupted; completed results are on disk, no file is partial", file=sys.stderr)
        return 130
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        what = f"{type(error).__name__}: {first}" if first else type(error).__name__
        return _end(f"{what}; this is a bug, please report it with {_traceback_file()}", 70, debug)


def in_options(error: InputError) -> str:
    """The message of an error with arguments as the options of the command line.

    >>> from mergekit_vision.cli.main import in_options
    >>> from mergekit_vision.errors import InputError
    >>> in_options(InputError("`scale` is inf", of="model"))
    '--model.scale is inf'
    """
    if error.of is None:
        return str(error)
    prefix = _PREFIX[error.of]

    def option(name: re.Match[str]) -> str:
        full = f"{prefix}{name[1]}"
        return _LINKED.get(full, full)

    return re.sub(r"(?<!did you mean )`([\w.]+)`", option, str(error))


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"mergekit-vision {__version__}")
        return 0
    check_command(arguments)
    if arguments[0] == "methods":
        from mergekit_vision.cli.methods import list_methods

        list_methods(arguments[1:])
    elif arguments[0] == "export":
        from mergekit_vision.cli.export import export

        export(arguments[1:])
    else:
        from mergekit_vision.cli.program import run

        run(arguments)
    return 0


def _end(message: str, status: int, debug: bool) -> int:
    """Say why a run ends."""
    if debug:
        traceback.print_exc()
    print(f"mergekit-vision: error: {message}", file=sys.stderr)
    return status


def _traceback_file() -> str:
    """Write the traceback at hand to a file of its own, and say where it is."""
    import tempfile

    try:
        with tempfile.NamedTemporaryFile("w", prefix="mergekit-vision-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write(f"mergekit-vision {__version__}: {' '.join(sys.argv)}\n\n{traceback.format_exc()}")
    except OSError:
        return "what --debug shows"
    return f"the traceback in {file.name} (--debug shows it)"
