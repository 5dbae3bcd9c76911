"""Checkpoints on the Hugging Face hub."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from mergekit_vision.checkpoints.opening import read_object
from mergekit_vision.errors import InputError
from mergekit_vision.support.hub import offline, request_errors

_ID = re.compile(r"(?:hf-hub:)?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?::(?P<inside>[^:\s].*))?")
_COMMIT = re.compile("[0-9a-f]{40}")
_FILES = ["*.json", "*.safetensors"]
_OLDER_FILES = ["*.json", "*.bin", "*.pt", "*.pth", "*.ckpt"]


class HubFile(NamedTuple):
    """What is meant by ``hf-hub:org/name[@revision][:path/in/repo]``.

    Attributes:
        repository: ``org/name``.
        revision: branch, tag or commit; the default branch where ``None``.
        inside: file or directory in the repository; all of it where ``None``.
    """

    repository: str
    revision: str | None = None
    inside: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubFile":
        """Take the parts of the text.

        Raises:
            InputError: when it is of another form, or leads out of the repository.

        >>> HubFile.parse("hf-hub:org/name@v1:experts/mnist.pt")
        HubFile(repository='org/name', revision='v1', inside='experts/mnist.pt')
        """
        found = _ID.fullmatch(text)
        if found is None:
            raise InputError(f"{text}: must be hf-hub:org/name, with @revision and :path/in/repo behind it if needed")
        inside, drive = PurePosixPath(found["inside"] or ""), PureWindowsPath(found["inside"] or "")
        if drive.anchor or ".." in drive.parts:  # of any system's paths: it is joined to a directory of this machine
            raise InputError(f"{text}: the path must be one in the repository, as in hf-hub:org/name:path/in/repo")
        return cls(found["repository"], found["revision"], None if inside == PurePosixPath() else str(inside))

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"hf-hub:{self.repository}{revision}{'' if self.inside is None else f':{self.inside}'}"


def fetch_snapshot(file: HubFile) -> Path:
    """A repository's files that may hold weights, or one of them, in the hub's cache on this machine.

    safetensors are preferred: other files are downloaded only where a repository has none outside of its directories.

    Raises:
        InputError: when the repository, revision or file does not exist, may not be read, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import LocalEntryNotFoundError, OfflineModeIsEnabled

    failures: tuple[type[Exception], ...] = (*request_errors(), ValueError)

    def download(patterns: Iterable[str], revision: str | None = file.revision) -> Path:
        return Path(snapshot_download(file.repository, revision=revision, allow_patterns=list(patterns)))

    try:
        if file.inside is not None:
            place = download(_patterns(file.inside)) / file.inside
            if shards := named_shards(place):
                download(_beside(file.inside, shards), commit_of(place) or file.revision)
        else:
            place = download(_FILES)
            if not any(place.glob("*.safetensors")):  # only those are looked for, not those of a directory in it
                place = download(_OLDER_FILES)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(f"{file}: is not in the hub's cache on this machine, and the hub cannot be reached") from error
    except failures as error:
        raise InputError(f"{file}: {_reason(error)}") from error
    if not place.exists():
        raise InputError(f"{file}: the repository has no such file or directory")
    return place


def cached_snapshot(file: HubFile) -> Path | None:
    """What :func:`fetch_snapshot` would give of what was downloaded before; ``None`` where that is nothing.

    Files that were to be downloaded with the others may still be missing in it.
    """
    try:
        with offline():
            return fetch_snapshot(file)
    except InputError:
        return None


def named_shards(index: Path) -> set[str]:
    """The files beside it that an index says hold the tensors; none where ``index`` is no such file."""
    if index.suffix != ".json" or not index.is_file():
        return set()
    try:
        named = read_object(index).get("weight_map")
    except InputError:  # opening it says what is wrong
        return set()
    return set(map(str, named.values())) if isinstance(named, dict) else set()


def remote_bytes(file: HubFile) -> int:
    """Size of the files that :func:`fetch_snapshot` downloads, by the hub; raises what its library does.

    An index is downloaded, to learn the names of its shards.
    """
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(file.repository, revision=file.revision, files_metadata=True)
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or []}

    def size_of(patterns: Iterable[str]) -> int:
        wanted = set(patterns)
        return sum(size for name, size in sizes.items() if any(fnmatchcase(name, pattern) for pattern in wanted))

    if file.inside is not None:
        shards = set[str]()
        if file.inside in sizes and file.inside.endswith(".json"):
            shards = named_shards(Path(hf_hub_download(file.repository, file.inside, revision=info.sha)))
        return size_of([*_patterns(file.inside), *_beside(file.inside, shards)])
    newer = any(name.endswith(".safetensors") and "/" not in name for name in sizes)
    return size_of(_FILES if newer else [*_FILES, *_OLDER_FILES])


def _patterns(inside: str) -> list[str]:
    """Of a file or directory in a repository, and of what beside it tells how it is read."""
    return [escape(inside), f"{escape(inside)}/*", *_beside(inside, ("config.json", "adapter_config.json"))]


def _beside(inside: str, names: Iterable[str]) -> list[str]:
    """Patterns of files in the directory that another one lies in."""
    return [escape(str(PurePosixPath(inside).parent / name)) for name in names]


def commit_of(place: Path) -> str:
    """The commit of a file in the hub's cache, which has it as the name of the snapshot's directory; empty for any other file."""
    pairs = zip(place.parts, place.parts[1:], strict=False)
    return next((name for above, name in pairs if above == "snapshots" and _COMMIT.fullmatch(name)), "")


def _reason(error: Exception) -> str:
    """What went wrong, in a line: the hub's own explanation comes behind the address and an empty line."""
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "its owner asks for an agreement first; accept it on the hub and log in by `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or it is private; check the name, and log in by `hf auth login` if it is yours"
    if isinstance(error, RevisionNotFoundError):
        return "no such revision; give a branch, a tag or a commit of the repository"
    return " ".join(str(error).split()) or type(error).__name__
