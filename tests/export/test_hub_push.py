"""A merged model on its way to the hub."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from loopback_hub import READER, WRITER, LoopbackHub, point_at

from mergekit_vision.cli.main import main
from mergekit_vision.export.directory import load
from mergekit_vision.export.manifest import read_record, write_record

markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py, which newer versions of rich bring along")

REPO = "org/merged"


@pytest.fixture(scope="module")
def models(tiny_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A static and a dynamic merged model of the tiny suite."""
    root = tmp_path_factory.mktemp("models")
    for name, options in (("TaskArithmetic", []), ("SMILE", ["--merger.rank", "4", "--merger.gate_rank", "2"])):
        assert main(["merge", "-s", str(tiny_suite), "-m", name, *options, "-o", str(root / name)]) == 0
    return {"static": root / "TaskArithmetic", "dynamic": root / "SMILE"}


@pytest.fixture
def hub(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub at which this process may write."""
    point_at(loopback_hub, tmp_path / "home", monkeypatch, token=WRITER)
    return loopback_hub


@pytest.fixture
def model(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the static model that a test may spoil."""
    return Path(shutil.copytree(models["static"], tmp_path / "model"))


def push(directory: Path, *options: str) -> int:
    return main(["push", "--merged", str(directory), "--repo", REPO, *options])


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)[1])  # type: ignore[index]
    return found


def change_record(directory: Path, **values: Any) -> None:
    """Change what ``merge.json`` says of the merge, as if it had been written so."""
    record = {**read_record(directory, verify=False), **values}
    aside = directory.with_name("aside")
    aside.mkdir()
    for name in ("merge.json", "config.yaml"):  # which the record does not vouch for
        (directory / name).rename(aside / name)
    write_record(directory, {key: value for key, value in record.items() if key not in ("files", "sha256", "schema")})
    (aside / "config.yaml").rename(directory / "config.yaml")
    shutil.rmtree(aside)


def write_results(directory: Path, path: Path, **values: Any) -> Path:
    """Accuracies of a model, as ``test`` writes them."""
    record = json.loads((directory / "merge.json").read_text())
    tasks = {task: {"accuracy": 0.25, "normalized": None, "n": 8} for task in record["experts"]}
    same = {key: record[key] for key in ("suite", "experts", "merger", "scale")}
    path.write_text(json.dumps({"kind": "evaluation", **same, "split": "test", "route": None, "tasks": tasks, **values}))
    return path


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_all_of_a_model_arrives_in_one_commit(
    hub: LoopbackHub, models: dict[str, Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(models[kind], "--private") == 0
    assert hub.messages(REPO) == ["initial commit", "Upload model merged with mergekit-vision"]
    assert hub.repositories["model", REPO].private
    arrived = hub.files(REPO)
    unchanged = ["open_clip_config.json", "open_clip_model.safetensors"]
    unchanged += ["experts.json", "experts.safetensors"] if kind == "dynamic" else []
    assert sorted(arrived) == sorted([*unchanged, "README.md", "merge.json"])
    assert {name: arrived[name] for name in unchanged} == {name: (models[kind] / name).read_bytes() for name in unchanged}
    printed = capsys.readouterr()
    assert hub.repositories["model", REPO].refs["main"] in printed.out
    assert WRITER not in printed.out + printed.err


def test_the_hub_gives_back_the_same_model(hub: LoopbackHub, models: dict[str, Path]) -> None:
    import open_clip
    from huggingface_hub import snapshot_download

    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert push(models["static"]) == 0
    there, here = (
        open_clip.create_model_and_transforms(name)[0].eval() for name in (f"hf-hub:{REPO}", f"local-dir:{models['static']}")
    )
    with torch.no_grad():
        assert torch.equal(there.encode_image(images), here.encode_image(images))
        torch.testing.assert_close(there.encode_image(images), load(models["static"])(images))
        assert push(models["dynamic"]) == 0
        assert torch.equal(load(snapshot_download(REPO))(images), load(models["dynamic"])(images))


def test_an_earlier_push_is_replaced(hub: LoopbackHub, models: dict[str, Path]) -> None:
    assert push(models["dynamic"]) == push(models["static"]) == 0
    assert len(hub.messages(REPO)) == 3
    assert "experts.safetensors" not in hub.files(REPO)
    hub.commit(REPO, {"notes.txt": "mine"})
    assert push(models["static"]) == 0
    assert hub.files(REPO)["notes.txt"] == b"mine"


def test_a_branch_is_made(hub: LoopbackHub, models: dict[str, Path]) -> None:
    assert push(models["static"], "--revision", "second/try") == 0
    assert hub.files(REPO) == {}
    assert "open_clip_model.safetensors" in hub.files(REPO, "second/try")


@pytest.mark.parametrize("branch", ["main", "second/try"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_code_of_a_card_loads_what_was_pushed(hub: LoopbackHub, models: dict[str, Path], kind: str, branch: str) -> None:
    assert push(models[kind], "--revision", branch) == 0
    code = re.search(r"```python\n(.*?)```", hub.files(REPO, branch)["README.md"].decode(), flags=re.DOTALL)[1]  # type: ignore[index]
    found: dict[str, Any] = {}
    exec(code, found)  # what a reader of the card would run
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encode = found["encoder"] if kind == "dynamic" else found["model"].eval().encode_image
    with torch.no_grad():
        torch.testing.assert_close(encode(images), load(models[kind])(images))


def test_a_dry_run_shows_everything_and_asks_nobody(
    hub: LoopbackHub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point_at(hub, tmp_path / "home", monkeypatch, offline=True)
    assert push(model, "--dry-run") == 0
    shown = capsys.readouterr().out
    size = (model / "open_clip_model.safetensors").stat().st_size
    assert f"{size:,}  open_clip_model.safetensors" in shown
    assert "stays here: config.yaml" in shown
    assert metadata(shown.partition("\n\n")[2])["library_name"] == "open_clip"
    assert hub.requests == []


def test_no_path_of_this_machine_goes_along(hub: LoopbackHub, model: Path, tmp_path: Path) -> None:
    experts = {"colors": "/home/me/colors.pt", "grays": "../../me/grays.pt", "stripes": "../../.cache/x/y.pt"}
    sources = {"colors": {"base": "/home/me/clip"}, "stripes": {"hub": "hf-hub:org/stripes@main:x/y.pt"}}
    merger = {**json.loads((model / "merge.json").read_text())["merger"], "init_args": {"file": "/home/me/secret.txt"}}
    (model / "tokenizer_config.json").write_text(json.dumps({"name_or_path": f"{tmp_path}/clip", "model_max_length": 77}))
    change_record(model, experts=experts, sources=sources, merger=merger, backbone=f"local-dir:{tmp_path}/clip")
    assert push(model) == 0
    text = b"\n".join(content for name, content in hub.files(REPO).items() if not name.endswith(".safetensors")).decode()
    assert not re.search(r"/home|\.\./|/tmp", text)
    assert str(tmp_path) not in text
    record = json.loads(hub.files(REPO)["merge.json"])
    assert record["experts"] == {"colors": "colors.pt", "grays": "grays.pt", "stripes": "hf-hub:org/stripes@main:x/y.pt"}
    assert record["merger"]["init_args"] == {"file": "secret.txt"}
    assert record["backbone"] == "local-dir:clip"


def test_the_card_says_what_was_measured(hub: LoopbackHub, model: Path) -> None:
    change_record(model, backbone="ViT-B-32-quickgelu", pretrained="openai", datasets={"grays": "org/grays"})
    change_record(model, experts={"colors": "a.pt", "grays": "hf-hub:org/grays-expert:x.pt", "stripes": "b.pt"})
    write_results(model, model / "results.json")
    assert push(model, "--license", "apache-2.0") == 0
    card = hub.files(REPO)["README.md"].decode()
    found = metadata(card)
    assert found["base_model"] == ["timm/vit_base_patch32_clip_224.openai", "org/grays-expert"]
    assert (found["base_model_relation"], found["license"]) == ("merge", "apache-2.0")
    assert (found["datasets"], found["pipeline_tag"]) == (["org/grays"], "zero-shot-image-classification")
    (entry,) = found["model-index"]
    assert entry["name"] == "tiny TaskArithmetic"
    assert [result["metrics"][0]["value"] for result in entry["results"]] == [0.25] * 3
    datasets = {result["dataset"]["name"]: result["dataset"]["type"] for result in entry["results"]}
    assert datasets == {"colors": "custom", "grays": "org/grays", "stripes": "custom"}
    assert {result["dataset"]["split"] for result in entry["results"]} == {"test"}
    assert "| grays | hf-hub:org/grays-expert:x.pt | 25.00 % | 8 |" in card
    assert f"hf-hub:{REPO}" in card
    configuration = json.loads(re.search(r"```json\n(.*?)\n```", card, flags=re.DOTALL)[1])  # type: ignore[index]
    uploaded = json.loads(hub.files(REPO)["merge.json"])
    assert configuration == {key: value for key, value in uploaded.items() if key not in ("files", "sha256", "schema")}


def test_a_local_backbone_is_no_base_model(hub: LoopbackHub, model: Path) -> None:
    assert push(model) == 0
    found = metadata(hub.files(REPO)["README.md"].decode())
    assert not {"base_model", "base_model_relation", "model-index", "datasets"} & found.keys()
    assert found["license"] == "other"


def test_names_are_text_and_nothing_else(hub: LoopbackHub, model: Path) -> None:
    evil = "a\n---\nlicense: mit\n---\n<script>alert(1)</script> | [x](http://x.example) ![](y) `z` \"q\": 'r'"
    change_record(model, suite=evil, experts={evil: f"{evil}.pt", "---": "b.pt"})
    write_results(model, model / "results.json")
    assert push(model) == 0
    card = hub.files(REPO)["README.md"].decode()
    found = metadata(card)
    assert found["license"] == "other"
    assert found["model-index"][0]["name"] == f"{' '.join(evil.split())} TaskArithmetic"
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(card.partition("\n---\n")[2])
    assert not re.search(r"<(script|a|img)\b", html)
    assert html.count("<tr>") == 3
    assert html.count("<h1>") == 1
    assert html.count("<h2>") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "comparison"},
            "kind: must be 'evaluation', not the str 'comparison'; name the file that test or validate wrote",
        ),
        (
            {"tasks": {"colors": {"accuracy": 2, "n": 3}}},
            "tasks.colors.accuracy: must be a number from 0 to 1, not the int 2; name",
        ),
        ({"tasks": {}}, "tasks: must be at least one entry long"),
        ({"scale": 0.123}, "measured on another model, by its scale; test this one"),
        ({"expert_dtype": "bfloat16"}, "measured on another model, by its expert_dtype; test this one"),
        ({"experts": {"colors": "other.pt"}}, "measured on another model, by its experts; test this one"),
        ({"weights": {"open_clip_model.safetensors": "0" * 64}}, "measured on another model, by its weights; test this one"),
        ({"route": "oracle"}, "measured with route oracle"),
    ],
)
def test_only_accuracies_of_this_model_count(
    hub: LoopbackHub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    path = write_results(model, tmp_path / "other.json", **change)
    assert push(model, "--results", str(path)) == 1
    error = capsys.readouterr().err
    assert f"{path}: {message}" in error
    assert error.count("\n") == 1
    assert hub.requests == []


def test_accuracies_of_the_experts_before_are_refused(
    hub: LoopbackHub, tiny_suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that is asked for is the same, but for the experts."""
    model = tmp_path / "model"
    merge = ["merge", "-s", str(tiny_suite), "-m", "TaskArithmetic", "-o", str(model), "--experts"]
    assert main([*merge, "[colors, grays]"]) == 0
    assert main(["test", "-s", str(tiny_suite), "--merged", str(model), "-o", str(model)]) == 0
    assert push(model, "--dry-run") == 0
    assert main([*merge, "[colors, stripes]"]) == 0
    capsys.readouterr()
    assert push(model, "--dry-run") == 1
    assert "measured on another model, by its experts, weights; test this one" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"kind": "comparison"}, {"kind": ["evaluation"]}, {"kind": None}])
def test_what_is_no_evaluation_is_left_out_unless_it_was_named(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    path = write_results(model, model / "results.json", **change)
    assert push(model) == 0
    assert f"{path}: is no evaluation, so the card has no accuracies" in capsys.readouterr().out
    assert "model-index" not in metadata(hub.files(REPO)["README.md"].decode())
    assert push(model, "--results", str(path)) == 1
    assert "kind: must be 'evaluation'" in capsys.readouterr().err


def test_accuracies_that_name_no_experts_are_doubted(
    hub: LoopbackHub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_results(model, tmp_path / "earlier.json", experts=None)
    assert push(model, "--results", str(path), "--dry-run") == 0
    assert f"{path}: does not say which experts were merged" in capsys.readouterr().out


def test_a_card_that_was_edited_here_is_mentioned_and_stays(
    hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "README.md").write_text("# Mine\n")
    assert push(model) == 0
    assert f"{model}: README.md has 7 bytes, but was written with" in capsys.readouterr().out
    assert "# Mine" not in hub.files(REPO)["README.md"].decode()
    assert (model / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("token", "offline", "message"),
    [
        (None, False, "no token to push with; log in by `hf auth login`, or set HF_TOKEN"),
        (READER, False, "does not permit writing there"),
        ("hf_wrong", False, "the hub does not accept the token"),
        (WRITER, True, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: LoopbackHub,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    token: str | None,
    offline: bool,
    message: str,
) -> None:
    point_at(hub, tmp_path / "home", monkeypatch, token=token, offline=offline)
    assert push(model) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert token is None or token not in printed.out + printed.err
    assert not hub.repositories


def test_an_unknown_license_is_the_hubs_to_refuse(hub: LoopbackHub, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(model, "--license", "none of them") == 1
    error = capsys.readouterr().err
    assert '"license" must be one of a list' in error
    assert error.count("\n") == 1
    assert hub.files(REPO) == {}


def test_a_hub_that_is_away(
    hub: LoopbackHub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(model) == 1
    assert "the hub cannot be reached" in capsys.readouterr().err


def test_a_mistake_is_found_before_the_hub_is_asked(
    hub: LoopbackHub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "--merged", str(model), "--repo", "no/such/name"]) == 1
    assert main(["push", "--merged", str(model), "--repo", "name"]) == 1
    assert push(tmp_path) == 1
    assert push(model, "--results", str(tmp_path / "none.json")) == 1
    (model / "open_clip_model.safetensors").unlink()
    assert push(model, "--dry-run") == 1
    errors = capsys.readouterr().err.splitlines()
    words = ["--repo no/such/name", "name it as org/name", "not a merged model", "none.json", "safetensors is missing"]
    assert all(word in error for word, error in zip(words, errors, strict=True))
    assert hub.requests == []
