"""Experts and backbones on the hub, against a hub on the loopback interface."""

import io
import json
from pathlib import Path

import pytest
import torch
from clip_models import embeddings, huggingface_model, open_clip_tower, their_embeddings
from loopback_hub import READER, LoopbackHub, point_at
from safetensors.torch import save

from mergekit_vision.checkpoints import ExpertSource, open_expert
from mergekit_vision.checkpoints.hub import HubFile, commit_of, remote_bytes
from mergekit_vision.encoders.backbone import describe_backbone, load_clip
from mergekit_vision.errors import InputError

TOWER = {f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()}


@pytest.fixture
def hub(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """The hub, as this process sees it."""
    point_at(loopback_hub, tmp_path / "home", monkeypatch)
    return loopback_hub


def source(text: str) -> ExpertSource:
    return ExpertSource.parse(text, Path("/"))


def test_a_revision_is_a_commit_in_the_record(hub: LoopbackHub) -> None:
    first = hub.commit("org/experts", {"mnist.safetensors": save(TOWER)})
    second = hub.commit("org/experts", {"mnist.safetensors": save({key: value + 1 for key, value in TOWER.items()})})
    for revision, sha, added in (("@main", second, 1), (f"@{first}", first, 0), ("", second, 1)):
        expert = open_expert(source(f"hf-hub:org/experts{revision}:mnist.safetensors"))
        assert torch.equal(expert["visual.proj"], TOWER["visual.proj"] + added)
        assert expert.origin["hub"] == f"hf-hub:org/experts{revision}:mnist.safetensors"
        assert expert.origin["revision"] == sha


def test_only_what_is_needed_is_downloaded(hub: LoopbackHub, tmp_path: Path) -> None:
    files = {
        "model.safetensors": save(TOWER),
        "pytorch_model.bin": b"x" * 1000,
        "tf_model.h5": b"y" * 1000,
        "README.md": b"hello",
    }
    hub.commit("org/expert", files)
    hub.commit("org/many", {f"{name}/model.safetensors": save(TOWER) for name in ("a", "b")})
    open_expert(source("hf-hub:org/expert"))
    expert = open_expert(source("hf-hub:org/many:a"))
    assert expert.path.parts[-2:] == ("a", "model.safetensors")
    found = {file.name for file in (tmp_path / "home").rglob("*") if file.is_symlink()}
    assert found == {"model.safetensors"}
    assert not [file for file in (tmp_path / "home").rglob("b") if file.is_dir()]


def test_what_tells_of_a_file_is_downloaded_with_it(hub: LoopbackHub) -> None:
    layer = "base_model.model.vision_model.encoder.layers.0.mlp.fc1.lora_"
    adapter = save({f"{layer}A.weight": torch.ones(2, 32), f"{layer}B.weight": torch.ones(128, 2)})
    files = {"adapter_model.safetensors": adapter, "adapter_config.json": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 6}'}
    hub.commit("org/adapter", {**files, **{f"inside/{name}": content for name, content in files.items()}})
    for place in ("", "inside/"):
        assert open_expert(source(f"hf-hub:org/adapter:{place}adapter_model.safetensors")).origin["scale"] == 3
    hub.commit(
        "org/tower", {"x.safetensors": save(TOWER), "config.json": b'{"model_type": "clip_vision_model", "hidden_act": "gelu"}'}
    )
    assert open_expert(source("hf-hub:org/tower:x.safetensors")).origin["activation"] == "gelu"


@pytest.mark.parametrize("inside", ["/{}", "a/../../{}", "..", "C:/{}", "\\{}", "a\\..\\..\\{}"])
def test_a_path_leads_nowhere_but_into_the_repository(hub: LoopbackHub, inside: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(save(TOWER))
    hub.commit("org/experts", {"x.safetensors": save(TOWER)})
    text = f"hf-hub:org/experts:{inside.format(secret)}"
    with pytest.raises(InputError, match="the path must be one in the repository, as in hf-hub:org/name:path/in/repo"):
        open_expert(source(text))
    assert hub.requests == []


def test_a_path_may_be_written_in_several_ways(hub: LoopbackHub) -> None:
    content = {"adapter[1].safetensors": save(TOWER), "adapter1.safetensors": b"x", "sub/model.safetensors": save(TOWER)}
    hub.commit("org/experts", content)
    for inside, plain in (
        ("./sub/model.safetensors", "sub/model.safetensors"),
        ("sub//model.safetensors", "sub/model.safetensors"),
        ("sub/", "sub"),
        ("adapter[1].safetensors", "adapter[1].safetensors"),
    ):
        parsed = HubFile.parse(f"hf-hub:org/experts:{inside}")
        assert str(parsed) == f"hf-hub:org/experts:{plain}"
        assert remote_bytes(parsed) == len(save(TOWER))
        assert torch.equal(open_expert(source(f"hf-hub:org/experts:{inside}"))["visual.proj"], TOWER["visual.proj"])
    assert not any("adapter1" in request for request in hub.requests)
    for whole in ("hf-hub:org/experts:.", "hf-hub:org/experts:./"):
        assert HubFile.parse(whole) == HubFile("org/experts")


def test_weights_of_a_directory_are_not_those_of_the_repository(hub: LoopbackHub) -> None:
    torch.save(TOWER, buffer := io.BytesIO())
    other = save({key: value + 1 for key, value in TOWER.items()})
    files = {"pytorch_model.bin": buffer.getvalue(), "onnx/model.safetensors": other, "README.md": b"hello"}
    hub.commit("org/older", files)
    assert torch.equal(open_expert(source("hf-hub:org/older"))["visual.proj"], TOWER["visual.proj"])
    assert remote_bytes(HubFile("org/older")) == len(buffer.getvalue()) + len(other)
    hub.commit("org/older", {"model.safetensors": other})
    assert remote_bytes(HubFile("org/older")) == 2 * len(other)


def test_a_commit_is_told_by_the_cache_alone() -> None:
    sha = "0123456789abcdef" * 2 + "01234567"
    snapshots = Path("hub/models--org--x/snapshots")
    for place, commit in (
        (Path("/mnt/snapshots/hf") / snapshots / sha / "sub" / "x.pt", sha),
        (Path("/home") / snapshots / sha, sha),
        (Path("/mnt/snapshots"), ""),
        (Path("/mnt/snapshots/nightly/x.pt"), ""),
        (Path(f"/mnt/{sha}/x.pt"), ""),
    ):
        assert commit_of(place) == commit


@pytest.mark.parametrize("folder", ["", "a[b]/"])
def test_shards_come_with_their_index(hub: LoopbackHub, folder: str) -> None:
    index, shards = sharded(folder)
    hub.commit("org/shards", {**index, **shards, f"{folder}model-other.safetensors": b"x" * 1000})
    file = f"hf-hub:org/shards:{folder}model.safetensors.index.json"
    expert = open_expert(source(file))
    assert all(torch.equal(expert[key], value) for key, value in TOWER.items())
    assert remote_bytes(HubFile.parse(file)) == sum(map(len, [*index.values(), *shards.values()]))
    assert not any("model-other" in request for request in hub.requests)


def sharded(folder: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """A tower in two files of a repository, and the index of them."""
    keys = sorted(TOWER)
    parts = {f"model-0000{number + 1}-of-00002.safetensors": keys[number::2] for number in range(2)}
    weight_map = {key: name for name, held in parts.items() for key in held}
    shards = {f"{folder}{name}": save({key: TOWER[key] for key in held}) for name, held in parts.items()}
    return {f"{folder}model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}, shards


def test_what_cannot_be_had_is_one_line(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/expert", {"x.safetensors": save(TOWER)})
    hub.commit("org/secret", {"x.safetensors": save(TOWER)}, private=True)
    hub.create("org/gated", gated=True)
    for text, hint in (
        ("hf-hub:org/nothing", "no such repository, or it is private"),
        ("hf-hub:org/secret", "no such repository, or it is private"),
        ("hf-hub:org/expert@v9", "no such revision"),
        ("hf-hub:org/expert:y.safetensors", "no such file or directory"),
    ):
        with pytest.raises(InputError, match=f"{text}: .*{hint}") as caught:
            open_expert(source(text))
        assert "\n" not in str(caught.value)
    point_at(hub, tmp_path / "home", monkeypatch, token=READER)
    assert open_expert(source("hf-hub:org/secret")).shapes


def test_a_connection_that_is_reset_is_one_line(hub: LoopbackHub) -> None:
    hub.commit("org/expert", {"x.safetensors": save(TOWER)})
    hub.interrupt("org/expert", "x.safetensors", after=1000, reset=True)
    with pytest.raises(InputError, match=r"hf-hub:org/expert: .*reset by peer") as caught:
        open_expert(source("hf-hub:org/expert"))
    assert "\n" not in str(caught.value)
    assert open_expert(source("hf-hub:org/expert")).shapes


def test_offline_the_cache_is_used_and_what_lacks_named(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/expert", {"x.safetensors": save(TOWER)})
    hub.commit("org/other", {"x.safetensors": save(TOWER)})
    online = open_expert(source("hf-hub:org/expert"))
    point_at(hub, tmp_path / "home", monkeypatch, offline=True)
    assert open_expert(source("hf-hub:org/expert")).fingerprint() == online.fingerprint()
    with pytest.raises(InputError, match=r"hf-hub:org/other: is not in the hub's cache on this machine"):
        open_expert(source("hf-hub:org/other"))


def test_a_backbone_of_transformers_on_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the library transformers")
    model = huggingface_model()
    model.save_pretrained(tmp_path / "model")
    first = hub.push("org/clip", tmp_path / "model")
    hub.commit("org/clip", {"config.json": b"{}"})
    clip = load_clip(f"hf-hub:org/clip@{first}")
    visual = {f"visual.{key}": value for key, value in clip.visual.state_dict().items()}
    assert torch.allclose(embeddings(visual), their_embeddings(model), atol=1e-5)
    assert describe_backbone(f"hf-hub:org/clip@{first}").activation == "quick_gelu"
