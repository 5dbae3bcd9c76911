"""``mergekit-vision export``: a merged model in another format."""

from argparse import BooleanOptionalAction

from mergekit_vision.cli.plain_parser import PlainParser, place
from mergekit_vision.export.formats import FORMATS


def export(arguments: list[str]) -> None:
    """Export a merged model.

    Args:
        arguments: of the command.

    Raises:
        InputError: for anything the user can correct.
        SystemExit: after ``--help``.
    """
    chosen = parser().parse_args(arguments)
    from mergekit_vision.export.exporting import export_model
    from mergekit_vision.support.console import console, console_output

    with console_output():
        difference = export_model(**vars(chosen))
    agreed = f"embeddings of {chosen.to} and of {chosen.merged} agree to {difference:.1e} of their norm"
    console.print(f"{chosen.output}: {agreed}", markup=False, highlight=False)


def parser() -> PlainParser:
    """The parser of the command's options, which are the arguments of ``export_model``."""
    parser = PlainParser(
        "export", "Write a merged model in another format, load it again by the format's own library, and compare the two."
    )
    formats = "; ".join(f"{name}: {form.text}" for name, form in FORMATS.items())
    parser.add_argument("--merged", type=place, required=True, metavar="DIR", help="directory of the merged model")
    parser.add_argument("--to", required=True, choices=FORMATS, help=formats)
    parser.add_argument("-o", "--output", type=place, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--device", default="cpu", help="device that a torch program is made for; cpu unless given")
    parser.add_argument("--base-only", action="store_true", help="leave out the routed experts of a dynamic model")
    parser.add_argument("--allow-code", action="store_true", help="import router classes that the model names: trust it first")
    verified = "compare the merged model's files with their checksums first; the default"
    parser.add_argument("--verify", action=BooleanOptionalAction, default=True, help=verified)
    return parser
