"""Checkpoints on the Hugging Face hub."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from mergekit_vision.errors import InputError
from mergekit_vision.support.hub import offline

_ID = re.compile(r"(?:hf-hub:)?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?::(?P<inside>[^:\s].*))?")
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
            InputError: when it is of another form.

        >>> HubFile.parse("hf-hub:org/name@v1:experts/mnist.pt")
        HubFile(repository='org/name', revision='v1', inside='experts/mnist.pt')
        """
        found = _ID.fullmatch(text)
        if found is None or ".." in Path(found["inside"] or "").parts:
            raise InputError(f"{text}: must be hf-hub:org/name, with @revision and :path/in/repo behind it if needed")
        return cls(found["repository"], found["revision"], found["inside"])

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"hf-hub:{self.repository}{revision}{'' if self.inside is None else f':{self.inside}'}"


def fetch_snapshot(file: HubFile) -> Path:
    """A repository's files that may hold weights, or one of them, in the hub's cache on this machine.

    safetensors are preferred: other files are downloaded only where there are none.

    Raises:
        InputError: when the repository, revision or file does not exist, may not be read, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    def download(patterns: list[str]) -> Path:
        return Path(snapshot_download(file.repository, revision=file.revision, allow_patterns=patterns))

    try:
        if file.inside is not None:
            inside = file.inside.rstrip("/")
            beside = [str(Path(inside).parent / name) for name in ("config.json", "adapter_config.json")]
            place = download([inside, f"{inside}/*", *beside]) / inside
        else:
            place = download(_FILES)
            if not any(place.rglob("*.safetensors")):
                place = download(_OLDER_FILES)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(f"{file}: is not in the hub's cache on this machine, and the hub cannot be reached") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
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


def remote_bytes(file: HubFile) -> int:
    """Size of the files that :func:`fetch_snapshot` downloads, by the hub; raises what its library does."""
    from huggingface_hub import HfApi

    found = HfApi().model_info(file.repository, revision=file.revision, files_metadata=True).siblings or []
    sizes = {each.rfilename: each.size or 0 for each in found}
    if file.inside is not None:
        return sum(size for name, size in sizes.items() if name == file.inside or name.startswith(f"{file.inside}/"))
    for patterns in (_FILES, _OLDER_FILES):
        chosen = {name: size for name, size in sizes.items() if any(fnmatch(name, pattern) for pattern in patterns)}
        if any(not name.endswith(".json") for name in chosen):
            return sum(chosen.values())
    return 0


def commit_of(place: Path) -> str:
    """The commit of a file in the hub's cache, which has it as the name of the snapshot's directory."""
    parts = place.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


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
