"""What the hub on the loopback interface answers: the part of the real one's HTTP interface that its libraries use."""

import base64
import json
import os
import re
import socket
import struct
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from loopback_hub import Blob, Commit, LoopbackHub, Repository

_API = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
_FILE = r"/(?P<datasets>datasets/)?(?P<name>[^/]+/[^/]+)"
_DATE = "2024-05-01T12:00:00.000Z"


class RefusalError(Exception):
    """An answer that says no.

    Args:
        status: of HTTP.
        message: for the reader.
        code: for the library, such as ``RepoNotFound``.
    """

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **headers}
        if code:
            self.headers["X-Error-Code"] = code


def handler(hub: "LoopbackHub") -> type["Handler"]:
    """The class whose instances answer the requests to ``hub``."""
    return type("HubHandler", (Handler,), {"hub": hub})


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    hub: "LoopbackHub"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing on the terminal."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        wanted = f" {self.headers['Range']}" if self.headers["Range"] else ""
        self.hub.requests.append(f"{self.command} {unquote(self.path)}{wanted}")
        self.body = self._read_body()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            self._find(url.path)()
        except RefusalError as refusal:
            self._reply(refusal.status, {"error": str(refusal)}, refusal.headers)

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _find(self, path: str) -> Callable[[], None]:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, answer in _ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path)):
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                return lambda: answer(self, parts)
        raise RefusalError(404, f"no such address: {self.command} {path}")

    def _reply(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    # who asks, and for what

    def _token(self) -> str:
        """The token that came along, if any.

        Raises:
            RefusalError: when it is none of this hub's.
        """
        from loopback_hub import READER, WRITER

        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in ("", READER, WRITER):
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return token

    def _repository(self, parts: Mapping[str, str]) -> "Repository":
        kind = parts.get("kind") or ("dataset" if parts.get("datasets") else "model")
        repository, token = self.hub.repositories.get((kind, parts["name"])), self._token()
        if repository is None or (repository.private and not token):
            raise RefusalError(404 if token else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit(self, repository: "Repository", parts: Mapping[str, str]) -> "Commit":
        commit = repository.at(parts.get("revision", "main"))
        if commit is None:
            raise RefusalError(404, f"Invalid rev id: {parts['revision']}", "RevisionNotFound")
        return commit

    def _check_writer(self, name: str) -> None:
        from loopback_hub import WRITER

        token = self._token()
        if not token:
            raise RefusalError(401, "Invalid username or password.")
        if token != WRITER:
            raise RefusalError(403, f"You don't have the rights to write under the namespace {name.partition('/')[0]}")

    # reading

    def info(self, parts: Mapping[str, str]) -> None:
        repository = self._repository(parts)
        commit = self._commit(repository, parts)
        siblings = [{"rfilename": path, "size": blob.size, "blobId": blob.oid} for path, blob in commit.files.items()]
        flags = {"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False}
        about = {"id": repository.id, "sha": commit.sha, "lastModified": _DATE, "createdAt": _DATE, "siblings": siblings}
        self._reply(200, {"_id": repository.id, **about, **flags, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, parts: Mapping[str, str]) -> None:
        commit = self._commit(self._repository(parts), parts)
        below = f"{parts['path'].rstrip('/')}/" if parts.get("path") else ""
        inside = {path: blob for path, blob in commit.files.items() if path.startswith(below)}
        if below and not inside:
            raise RefusalError(404, f"{below} does not exist", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = [*_folders(inside, below), *(_entry(path, blob) for path, blob in inside.items())]
        self._reply(200, [entry for entry in entries if deep or "/" not in entry["path"].removeprefix(below)])

    def paths_info(self, parts: Mapping[str, str]) -> None:
        commit = self._commit(self._repository(parts), parts)
        text = self.body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        known = {entry["path"]: entry for entry in _folders(commit.files, "")}
        known |= {path: _entry(path, blob) for path, blob in commit.files.items()}
        self._reply(200, [known[path] for path in asked if path in known])

    def refs(self, parts: Mapping[str, str]) -> None:
        refs = self._repository(parts).refs
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs.items()]
        self._reply(200, {"branches": branches, "tags": [], "converts": []})

    def resolve(self, parts: Mapping[str, str]) -> None:
        repository = self._repository(parts)
        commit = self._commit(repository, parts)
        if repository.gated:
            raise RefusalError(403 if self._token() else 401, f"Access to {repository.id} is restricted", "GatedRepo")
        blob = commit.files.get(parts["path"])
        if blob is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.large:
            linked = {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size), "Content-Length": "0"}
            self._head(302, {**headers, **linked, "Location": f"{self.hub.storage}/{blob.sha256}"})
        else:
            self._send(blob, headers)

    def stored(self, parts: Mapping[str, str]) -> None:
        blob = self.hub.stored(parts["oid"])
        if self.headers["Authorization"]:
            raise RefusalError(400, "a token is not to be sent to the storage")
        self._send(blob, {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"})

    def _send(self, blob: "Blob", headers: Mapping[str, str]) -> None:
        """Send a file or the part asked for, unless the connection is to break."""
        start, end = _range(self.headers["Range"], blob.size)
        if start >= blob.size > 0:
            raise RefusalError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{blob.size}"})
        part = {"Content-Range": f"bytes {start}-{end - 1}/{blob.size}"} if self.headers["Range"] else {}
        kind = {"Content-Type": "application/octet-stream", "Last-Modified": formatdate(0, usegmt=True)}
        self._head(206 if part else 200, {**headers, **kind, **part, "Content-Length": str(end - start)})
        if self.command == "HEAD":
            return
        data, (broken, reset) = blob.path.read_bytes()[start:end], self.hub.interruption(blob)
        self.wfile.write(data[:broken])
        self.close_connection = self.close_connection or broken is not None
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # without a farewell
            os.close(self.connection.detach())

    def who(self, _: Mapping[str, str]) -> None:
        if not self._token():
            raise RefusalError(401, "Invalid username or password.")
        self._reply(200, {"type": "user", "name": "someone", "fullname": "Someone", "orgs": []})

    # writing

    def create(self, _: Mapping[str, str]) -> None:
        asked = json.loads(self.body)
        name, kind = f"{asked.get('organization') or 'someone'}/{asked['name']}", asked.get("type") or "model"
        self._check_writer(name)
        private = asked.get("private") or asked.get("visibility") == "private"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        with self.hub.lock:
            there = (kind, name) in self.hub.repositories
            if not there:
                self.hub.create(name, kind, bool(private))
        self._reply(409 if there else 200, url | ({"error": "You already created this model repo"} if there else {}))

    def branch(self, parts: Mapping[str, str]) -> None:
        self._check_writer(parts["name"])
        repository = self._repository(parts)
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        with self.hub.lock:
            if parts["revision"] in repository.refs:
                raise RefusalError(409, f"Reference already exists: {parts['revision']}")
            repository.refs[parts["revision"]] = self._commit(repository, {"revision": start}).sha
        self._reply(200, {})

    def validate_yaml(self, _: Mapping[str, str]) -> None:
        text = json.loads(self.body)["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, flags=re.DOTALL)
        try:
            content = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            self._reply(400, {"errors": [{"message": str(error)}], "warnings": []})
            return
        known = content.get("license") in ("other", "mit", "apache-2.0")
        self._reply(200 if known else 400, {"errors": [] if known else [{"message": '"license" must be one of a list'}]})

    def preupload(self, parts: Mapping[str, str]) -> None:
        self._check_writer(parts["name"])
        self._commit(self._repository(parts), parts)
        answers = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if b"\0" in base64.b64decode(file["sample"]) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self._reply(200, {"files": answers})

    def batch(self, parts: Mapping[str, str]) -> None:
        self._check_writer(parts["name"])
        objects = []
        for item in json.loads(self.body)["objects"]:
            there = self.hub.holds(item["oid"])
            upload = {"actions": {"upload": {"href": f"{self.hub.storage}/{item['oid']}"}}}
            objects.append({"oid": item["oid"], "size": item["size"], **({} if there else upload)})
        self._reply(200, {"transfer": "basic", "objects": objects})

    def receive(self, parts: Mapping[str, str]) -> None:
        if self.hub.store(self.body).sha256 != parts["oid"]:
            raise RefusalError(400, "the content does not have this sha256")
        self._reply(200, {})

    def add_commit(self, parts: Mapping[str, str]) -> None:
        self._check_writer(parts["name"])
        repository = self._repository(parts)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            before = self._commit(repository, parts)
            if header.get("parentCommit") not in (None, before.sha):
                raise RefusalError(412, "The branch has moved since the parent commit")
            files = dict(before.files)
            for line in lines:
                self._apply(line["key"], line["value"], files)
            commit = repository.add(parts.get("revision", "main"), files, header["summary"])
        url = f"{self.hub.endpoint}/{repository.id}/commit/{commit.sha}"
        self._reply(200, {"success": True, "commitOid": commit.sha, "commitUrl": url, "pullRequestUrl": None})

    def _apply(self, operation: str, value: Mapping[str, Any], files: dict[str, "Blob"]) -> None:
        if operation == "file":
            files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
        elif operation == "lfsFile":
            files[value["path"]] = self.hub.stored(value["oid"])
        elif operation in ("deletedFile", "deletedFolder"):
            for path in [path for path in files if path == value["path"] or path.startswith(f"{value['path'].rstrip('/')}/")]:
                del files[path]


_ROUTES: list[tuple[str, str, Callable[[Handler, Mapping[str, str]], None]]] = [
    ("GET", rf"{_API}(/revision/(?P<revision>[^/]+))?", Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", Handler.tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET", rf"{_API}/refs", Handler.refs),
    ("GET", rf"{_FILE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET", r"/api/whoami-v2", Handler.who),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", rf"{_API}/branch/(?P<revision>[^/]+)", Handler.branch),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"{_FILE}\.git/info/lfs/objects/batch", Handler.batch),
    ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", Handler.stored),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", Handler.receive),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", Handler.add_commit),
]


def _entry(path: str, blob: "Blob") -> dict[str, Any]:
    large = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.large else {}
    return {"type": "file", "oid": blob.oid, "size": blob.size, "path": path, **large}


def _folders(files: Mapping[str, Any], below: str) -> list[dict[str, Any]]:
    """The directories inside of ``below`` that hold any of the files."""
    names = {path[:end] for path in files for end, letter in enumerate(path) if letter == "/" and end >= len(below)}
    return [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(names)]


def _range(header: str | None, size: int) -> tuple[int, int]:
    """First byte, and the one after the last, that a ``Range`` header asks for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not match or match[0] == "bytes=-":
        return 0, size
    if not match[1]:
        return max(size - int(match[2]), 0), size
    return int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
