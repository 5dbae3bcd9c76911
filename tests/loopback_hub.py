"""A Hugging Face hub on the loopback interface, for tests: repositories of models and data sets that clients read and write.

A test fills it by :meth:`LoopbackHub.commit` and reads back what clients pushed from :meth:`LoopbackHub.files`. Clients are
processes of their own with :meth:`LoopbackHub.environment`, or this process after :func:`point_at`.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import pytest

WRITER, READER = "hf_loopback_writer", "hf_loopback_reader"
"""Tokens: the writer may do everything, the reader sees private repositories and may write none."""

Kind = str
"""Of a repository: ``model`` or ``dataset``."""


@dataclass(frozen=True)
class Blob:
    """The content of a file.

    Attributes:
        path: where it lies on the hub's disk.
        size: in bytes.
        oid: as git names it.
        sha256: of the content.
        large: whether the hub keeps it in its large file storage; it does so with all that is not text.
    """

    path: Path
    size: int
    oid: str
    sha256: str
    large: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    """A state of a repository: its files by their paths."""

    sha: str
    message: str
    files: Mapping[str, Blob]


@dataclass
class Repository:
    """A repository with its history.

    Attributes:
        private: whether it is there only for who has a token.
        gated: whether its files, but not their names, are only for who has been granted access, which is nobody.
        commits: all of them, by their sha.
        refs: branches and tags -> the commit's sha.
    """

    id: str
    kind: Kind
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def add(self, branch: str, files: Mapping[str, Blob], message: str) -> Commit:
        parent = self.refs.get(branch, "")
        names = "".join(f"{path}{blob.sha256}" for path, blob in sorted(files.items()))
        sha = hashlib.sha1(f"{self.kind}{self.id}{len(self.commits)}{parent}{message}{names}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, message, dict(files))
        self.refs[branch] = sha
        return self.commits[sha]


class LoopbackHub:
    """The state of the hub, and the server that shows it.

    Args:
        root: directory for the contents of its files.

    Attributes:
        endpoint: its address, for ``HF_ENDPOINT``.
        storage: address of its large files, on another host name as with the real one.
        requests: method and path of every request so far, with the range of bytes asked for: ``GET /a/b c bytes=10-``.
    """

    def __init__(self, root: Path) -> None:
        from loopback_server import handler

        self.root, self.lock = root, Lock()
        self.repositories: dict[tuple[Kind, str], Repository] = {}
        self.requests: list[str] = []
        self._blobs: dict[str, Blob] = {}
        self._interrupted: dict[str, tuple[int, bool]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}/storage"

    @contextmanager
    def serving(self) -> Iterator["LoopbackHub"]:
        thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def create(self, name: str, kind: Kind = "model", private: bool = False, gated: bool = False) -> Repository:
        """Make an empty repository, with a first commit as the hub does."""
        repository = Repository(name, kind, private, gated)
        repository.add("main", {}, "initial commit")
        self.repositories[kind, name] = repository
        return repository

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes | str | Path],
        kind: Kind = "model",
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
        tag: str | None = None,
    ) -> str:
        """Add files to a repository, which is made where it is missing, and give the commit's sha.

        Args:
            name: ``org/name``.
            files: path in the repository -> content, or a file to copy.
            kind: ``model`` or ``dataset``.
            branch: started from ``main`` where it is new.
            private: of a new repository.
            gated: of a new repository.
            tag: a name for this commit.
        """
        repository = self.repositories.get((kind, name)) or self.create(name, kind, private, gated)
        before = repository.at(branch) or repository.commits[repository.refs["main"]]
        added = {path: self.store(content) for path, content in files.items()}
        commit = repository.add(branch, {**before.files, **added}, f"add {len(files)} files")
        if tag:
            repository.refs[tag] = commit.sha
        return commit.sha

    def push(self, name: str, directory: Path, **options: str | bool) -> str:
        """:meth:`commit` of all files of a directory."""
        files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
        return self.commit(name, files, **options)  # type: ignore[arg-type]

    def store(self, content: bytes | str | Path) -> Blob:
        """Keep the content of a file."""
        data = content.read_bytes() if isinstance(content, Path) else content.encode() if isinstance(content, str) else content
        sha256 = hashlib.sha256(data).hexdigest()
        path = self.root / sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return self._blobs.setdefault(sha256, Blob(path, len(data), oid, sha256, large=b"\0" in data[:512]))

    def holds(self, sha256: str) -> bool:
        """Whether there is a content of this hash."""
        return sha256 in self._blobs

    def stored(self, sha256: str) -> Blob:
        """The content of this hash."""
        return self._blobs[sha256]

    def files(self, name: str, revision: str = "main", kind: Kind = "model") -> dict[str, bytes]:
        """The files of a repository at a revision."""
        commit = self.repositories[kind, name].at(revision)
        assert commit, f"{name} has no {revision}"
        return {path: blob.path.read_bytes() for path, blob in commit.files.items()}

    def messages(self, name: str, kind: Kind = "model") -> list[str]:
        """The messages of all commits of a repository, in order."""
        return [commit.message for commit in self.repositories[kind, name].commits.values()]

    def interrupt(self, name: str, path: str, after: int, kind: Kind = "model", reset: bool = False) -> None:
        """Break the connection once, ``after`` so many bytes of the next download of the file ``path`` of ``main``.

        It is closed, or else ``reset``, as by a firewall.
        """
        commit = self.repositories[kind, name].at("main")
        assert commit
        self._interrupted[commit.files[path].sha256] = after, reset

    def interruption(self, blob: Blob) -> tuple[int | None, bool]:
        """After how many bytes a download of this content that begins now breaks off, and whether the connection is reset."""
        return self._interrupted.pop(blob.sha256, (None, False))

    def environment(self, home: Path, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Environment of a client process, whose caches lie in ``home``."""
        foreign = ("HF_", "HUGGING_FACE", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        own = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
        own |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": str(int(offline))}
        return {**own, "HF_TOKEN": token} if token else own


def point_at(
    hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = None, offline: bool = False
) -> None:
    """Make this process a client of the hub, with its caches in ``home``, until the test ends.

    The libraries read the environment when they are imported, so what they made of it is replaced too.
    """
    from huggingface_hub import constants, hf_api

    if not hasattr(constants, "HF_HUB_DISABLE_XET"):
        pytest.skip("huggingface_hub before 0.30 cannot be pointed at another hub once it is imported")
    for name, value in hub.environment(home, token, offline).items():
        if name.startswith(("HF_", "NO_PROXY")):
            monkeypatch.setenv(name, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    if datasets := sys.modules.get("datasets"):
        for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_DATASETS_CACHE": home / "datasets"}.items():
            monkeypatch.setattr(datasets.config, name, value)
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # of newer and older versions
            monkeypatch.setattr(datasets.config, name, offline, raising=False)
