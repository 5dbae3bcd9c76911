"""The hub on the loopback interface, as the real one's libraries see it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import READER, WRITER, LoopbackHub, point_at

LARGE = os.urandom(20_000) + b"\0" * 10
FILES = {"config.json": '{"a": 1}', "weights/model.bin": b"\0" + LARGE, "no text.txt": ""}


@pytest.fixture
def hub(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub that this process uses, without a token."""
    point_at(loopback_hub, tmp_path / "home", monkeypatch)
    return loopback_hub


def content(directory: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def as_bytes(files: dict[str, str | bytes]) -> dict[str, bytes]:
    return {name: value.encode() if isinstance(value, str) else value for name, value in files.items()}


def test_a_revision_is_downloaded_whole(hub: LoopbackHub) -> None:
    first = hub.commit("org/model", FILES, tag="v1")
    second = hub.commit("org/model", {"config.json": "{}"})
    hub.commit("org/model", {"other.txt": "other"}, branch="side/way")
    for revision, commit in ((None, second), ("v1", first), (first, first)):
        found = snapshot_download("org/model", revision=revision)
        assert Path(found).name == commit
        assert content(found) == {**as_bytes(FILES), **({"config.json": b"{}"} if commit == second else {})}
    assert (Path(snapshot_download("org/model", revision="side/way")) / "other.txt").read_text() == "other"
    assert HfApi().model_info("org/model", revision="v1").sha == first


def test_what_is_there_is_listed(hub: LoopbackHub) -> None:
    sha = hub.commit("org/model", FILES, kind="dataset", private=True)
    api = HfApi(token=READER)
    assert api.dataset_info("org/model").sha == sha
    assert sorted(api.list_repo_files("org/model", repo_type="dataset")) == sorted(FILES)
    assert [entry.path for entry in api.list_repo_tree("org/model", repo_type="dataset")] == [
        "weights", "config.json", "no text.txt"
    ]  # fmt: skip
    found = api.get_paths_info("org/model", ["weights", "weights/model.bin", "none"], repo_type="dataset")
    assert [getattr(entry, "size", None) for entry in found] == [None, len(LARGE) + 1]


def test_what_is_not_there_and_what_is_not_for_everyone(hub: LoopbackHub) -> None:
    hub.commit("org/model", FILES)
    hub.commit("org/secret", FILES, private=True)
    hub.commit("org/gated", FILES, gated=True)
    for repository, error in (("org/none", RepositoryNotFoundError), ("org/secret", RepositoryNotFoundError)):
        with pytest.raises(error):
            snapshot_download(repository)
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/gated", "config.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/model", "config.json", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/model", "none.json")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_expired").model_info("org/model")
    assert content(snapshot_download("org/secret", token=READER)) == as_bytes(FILES)


def test_a_broken_download_is_resumed_where_it_stopped(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.commit("org/model", FILES)
    hub.interrupt("org/model", "weights/model.bin", after=12_500)
    assert content(snapshot_download("org/model")) == as_bytes(FILES)
    ranges = [request.partition(" bytes=")[2] for request in hub.requests if request.startswith("GET /storage/")]
    assert ranges == ["", "12000-"]


def test_what_was_downloaded_is_there_offline(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/model", FILES)
    hub.commit("org/other", FILES)
    online = snapshot_download("org/model")
    hub.requests.clear()
    point_at(hub, tmp_path / "home", monkeypatch, offline=True)
    assert snapshot_download("org/model") == online
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download("org/other")
    assert hub.requests == []


def test_a_folder_is_pushed_in_one_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    for name, value in as_bytes(FILES).items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(value)
    api = HfApi(token=WRITER)
    api.create_repo("org/new", private=True)
    api.create_repo("org/new", exist_ok=True)
    api.create_branch("org/new", branch="draft")
    info = api.upload_folder(repo_id="org/new", folder_path=tmp_path / "folder", commit_message="all of it", revision="draft")
    assert hub.files("org/new", "draft") == as_bytes(FILES)
    assert hub.files("org/new") == {}
    assert hub.repositories["model", "org/new"].private
    assert hub.messages("org/new") == ["initial commit", "all of it"]
    assert info.oid == api.model_info("org/new", revision="draft").sha
    api.delete_folder("weights", repo_id="org/new", revision="draft")
    assert sorted(hub.files("org/new", "draft")) == ["config.json", "no text.txt"]


def test_who_may_write(hub: LoopbackHub) -> None:
    hub.commit("org/model", FILES)
    for token, status in ((READER, "403"), (False, "401")):
        api = HfApi(token=token)
        with pytest.raises(HfHubHTTPError, match=status):
            api.create_repo("org/new")
        with pytest.raises(HfHubHTTPError, match=status):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/model")
    assert hub.messages("org/model") == ["initial commit", "add 3 files"]


def test_another_process_is_a_client_too(loopback_hub: LoopbackHub, tmp_path: Path) -> None:
    loopback_hub.commit("org/model", FILES, private=True)
    script = "from huggingface_hub import snapshot_download; print(snapshot_download('org/model'))"
    environment = loopback_hub.environment(tmp_path / "home", token=READER)
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert content(found.stdout.strip()) == as_bytes(FILES)
    assert found.stdout.startswith(str(tmp_path / "home"))
