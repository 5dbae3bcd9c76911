"""A merged model on the Hugging Face hub: what goes there, and how it gets there in one commit."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_vision.encoders.config import CONFIG
from mergekit_vision.errors import InputError
from mergekit_vision.export.card import model_card
from mergekit_vision.export.hub_errors import hub_errors
from mergekit_vision.export.manifest import CARD, EXPERTS, ROUTERS, STATE, read_record, write_record
from mergekit_vision.export.results import own_results, read_results
from mergekit_vision.export.sharing import shareable, without_directories
from mergekit_vision.support.json_files import read_json, same, write_json

_OF_FILES = ("files", "sha256", "schema")  # what of a record is about its files, and not about the merge
_CONFIGURATIONS = (CONFIG, "tokenizer_config.json")  # which may name the directory that a tokenizer was read from


@dataclass(frozen=True)
class Parcel:
    """What of a merged model goes to the hub.

    Attributes:
        files: path in the repository -> the file on this machine, in order of their names.
        left: names of what else lies in the model's directory, which stays there.
    """

    files: Mapping[str, Path]
    left: tuple[str, ...]

    @property
    def card(self) -> str:
        """The model card."""
        return self.files[CARD].read_text(encoding="utf-8")


@contextmanager
def packed(
    directory: Path,
    repository: str,
    results: Path | None = None,
    license_id: str | None = None,
    verify: bool = True,
    revision: str | None = None,
) -> Iterator[Parcel]:
    """Put together what goes to the hub, without asking it.

    The model's files go as they are, but no path of this machine goes along: ``merge.json`` names files without their
    directories, and the model card is written anew. Files that are no part of the model stay, and what was kept for experts that
    join or leave it.

    Args:
        directory: of the merged model.
        repository: ``org/name``.
        results: ``results.json`` of an evaluation of this model, for the card; the one in ``directory`` unless given, if there is
            one. What lies there under that name and is no evaluation, such as a comparison, is left out with a warning.
        license_id: the license by its name on the hub; ``other`` unless given.
        verify: compare every file with the checksum that was recorded when it was written.
        revision: branch; ``main`` unless given.

    Yields:
        The parcel, whose files exist inside of the context.

    Raises:
        InputError: when the directory holds no whole merged model, or the results are of another one.
    """
    _check_repository(repository)
    record = read_record(directory, verify)
    names = [name for name in record.get("files", {}) if name not in (CARD, STATE)]
    if not names:
        raise InputError(f"{directory}: merged by an earlier version, which did not record the model's files; merge again")
    results = results or own_results(directory)
    accuracies, shared = None if results is None else read_results(results, record), _of_merge(record)
    with tempfile.TemporaryDirectory() as place:
        draft = Path(place).resolve()
        for name in names:
            _put(directory / name, draft / name)
        card = model_card(shared, ROUTERS in names, accuracies, license_id, repository, revision)
        (draft / CARD).write_text(card, encoding="utf-8")
        write_record(draft, shareable(shared))
        files = {path.name: path for path in sorted(draft.iterdir())}
        left = (path.name for path in directory.iterdir() if path.name not in files and not path.name.startswith("."))
        yield Parcel(files, tuple(sorted(left)))


def _of_merge(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _OF_FILES}


def _put(file: Path, draft: Path) -> None:
    """A link to a file, or where the file names directories, a copy that does not."""
    content = read_json(file) if file.name in _CONFIGURATIONS else None
    if content is None or same(content, without_directories(content)):
        draft.symlink_to(file.resolve())
    else:
        write_json(draft, without_directories(content))


def push(parcel: Parcel, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Upload a parcel in one commit. The repository and the branch are made where they are missing.

    A model of an earlier push is replaced: the files of its experts go, where this one has none.

    Args:
        parcel: what goes there.
        repository: ``org/name``.
        private: whether a new repository is private; an existing one stays as it is.
        revision: branch; ``main`` unless given.

    Returns:
        Address of the commit.

    Raises:
        InputError: when there is no token, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    _check_repository(repository)
    if not get_token():
        raise InputError(f"{repository}: no token to push with; log in by `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with hub_errors(repository):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision not in (None, "main"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = api.list_repo_files(repository, revision=revision)
        stale = [name for name in (EXPERTS, ROUTERS) if name in there and name not in parcel.files]
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in parcel.files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        message = "Upload model merged with mergekit-vision"
        return str(api.create_commit(repository, operations, commit_message=message, revision=revision).commit_url)


def _check_repository(repository: str) -> None:
    from huggingface_hub import utils as module

    utils: Any = module
    try:
        utils.validate_repo_id(repository)
    except utils.HFValidationError as error:
        raise InputError(f"`repo` {repository}: {' '.join(str(error).split())}", of="command") from error
    if repository.count("/") != 1:
        raise InputError(f"`repo` {repository}: name it as org/name, or your-name/name", of="command")
