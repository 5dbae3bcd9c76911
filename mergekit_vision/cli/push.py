"""``mergekit-vision push``: a merged model on the Hugging Face hub."""

from typing import TYPE_CHECKING

from mergekit_vision.cli.plain_parser import PlainParser, place
from mergekit_vision.support.terminal import harmless

if TYPE_CHECKING:
    from mergekit_vision.export.hub_push import Parcel


def push(arguments: list[str]) -> None:
    """Upload a merged model, or show what would be uploaded.

    Args:
        arguments: of the command.

    Raises:
        InputError: for anything the user can correct.
        SystemExit: after ``--help``.
    """
    chosen = parser().parse_args(arguments)
    from mergekit_vision.export import hub_push
    from mergekit_vision.support.console import console, console_output

    packed = hub_push.packed(chosen.merged, chosen.repo, chosen.results, chosen.license, chosen.verify, chosen.revision)
    with console_output(), packed as parcel:
        if chosen.dry_run:
            print(harmless(_listed(parcel, chosen.repo)))
        else:
            address = hub_push.push(parcel, chosen.repo, chosen.private, chosen.revision)
            console.print(f"{len(parcel.files)} files in one commit: {address}", markup=False)


def parser() -> PlainParser:
    """The parser of the command's options."""
    parser = PlainParser("push", "Upload a merged model to the Hugging Face hub in one commit, with a model card.")
    parser.add_argument("--merged", type=place, required=True, metavar="DIR", help="directory of the merged model")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository, made where it is missing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made where it is missing; main unless given")
    results = (
        "results.json that test or validate wrote of this model, for the card; DIR/results.json unless given, if it is there"
    )
    parser.add_argument("--results", type=place, metavar="FILE", help=results)
    parser.add_argument("--license", metavar="ID", help="license as the hub names it, such as apache-2.0; other unless given")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare the files with their checksums")
    parser.add_argument("--dry-run", action="store_true", help="list the files and print the card, and upload nothing")
    return parser


def _listed(parcel: "Parcel", repository: str) -> str:
    sizes = [f"{path.stat().st_size:>13,}  {name}" for name, path in parcel.files.items()]
    left = [f"stays here: {', '.join(parcel.left)}"] if parcel.left else []
    return "\n".join([f"to {repository}, in one commit:", f"{'bytes':>13}", *sizes, *left, "", parcel.card])
