"""Entry point of ``mergekit-vision`` and ``python -m mergekit_vision``; imports nothing heavy before it has to."""

import sys

from mergekit_vision.errors import InputError
from mergekit_vision.version import __version__

COMMANDS = {
    "merge": "merge the experts of a suite into one encoder and write it as a directory",
    "validate": "evaluate a merged encoder on every task's val split",
    "test": "evaluate a merged encoder on every task's test split",
    "predict": "classify images with a merged encoder and one task's classes",
    "compare": "merge with many methods, evaluate them all and write a report",
}

HELP = f"""usage: mergekit-vision COMMAND --suite SUITE.yaml [options]

Merge fine-tuned CLIP vision encoders without training, and evaluate the result.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

options:
  -h, --help   this text; COMMAND --help lists a command's options
  --version    print the version

example:
  mergekit-vision test --suite suite.yaml --model.merger ESM --model.scale search --output runs/esm
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status; a user's mistake is one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"mergekit-vision {__version__}")
        return 0
    try:
        _check_command(arguments)
        from mergekit_vision.cli import run

        run(arguments)
    except InputError as error:
        print(f"mergekit-vision: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mergekit-vision: interrupted; what was complete is on disk, nothing is half written", file=sys.stderr)
        return 130
    return 0


def _check_command(arguments: list[str]) -> None:
    first = arguments[0]
    if first in COMMANDS:
        return
    command = next((word for word in arguments if word in COMMANDS), None)
    if first.startswith("-") and command:
        rest = " ".join(word for word in arguments if word != command)
        raise InputError(f"options come after the command, {first} too: mergekit-vision {command} {rest}")
    raise InputError(f"{first}: not a command; the commands are {', '.join(COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main())
