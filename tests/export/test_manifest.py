"""The manifest of a merged model: every change is noticed, and every wrong value is one clear line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from killing import files_in
from small_models import DYNAMIC, Save, record_at

from mergekit_vision import InputError, load
from mergekit_vision.export.directory import load_experts
from mergekit_vision.export.manifest import files_of, read_record, write_record

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def pristine(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pristine")
    save(place, DYNAMIC)
    return place


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    """Of a dynamic model that a test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def edit(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def refused(directory: Path, *patterns: str, verify: bool = True) -> None:
    with pytest.raises(InputError) as caught:
        load(directory, verify=verify)
    lines = str(caught.value).splitlines()
    assert str(directory) in lines[0]
    assert len(lines) <= 3
    for pattern in patterns:
        assert pattern in str(caught.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that no model can be made of, and their manifest."""
    place = tmp_path_factory.mktemp("small")
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"):
        (place / name).write_bytes(name.encode() * 9)
    write_record(place, record_at(1.0))
    return place


def test_a_manifest_vouches_for_all_files(small: Path) -> None:
    record = read_record(small)
    assert record_at(1.0).items() <= record.items()
    assert record["schema"] == 1
    assert {*files_of(small), "merge.json"} == {path.name for path in small.iterdir()}


@given(data=st.data())
def test_one_byte_changed_in_any_file_is_noticed(small: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(small.iterdir())))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    other = bytes([content[position] ^ data.draw(st.integers(1, 255))])
    try:
        path.write_bytes(content[:position] + other + content[position + 1 :])
        with pytest.raises(InputError, match=r"merge again"):
            read_record(small)
    finally:
        path.write_bytes(content)
    read_record(small)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@given(content=st.one_of(st.binary(max_size=200), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists)))
def test_any_other_content_of_the_record_is_one_clear_error(place: Path, content: object) -> None:
    (place / "merge.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError, match=r"merge\.json: .*"):
        read_record(place, verify=False)


@pytest.mark.parametrize("name", ["experts.json", "experts.safetensors", "open_clip_config.json", "open_clip_model.safetensors"])
def test_a_missing_or_empty_file_is_noticed(directory: Path, name: str) -> None:
    content = (directory / name).read_bytes()
    (directory / name).unlink()
    refused(directory, f"{name} is missing; merge again")
    refused(directory, f"{name} is missing; merge again", verify=False)
    (directory / name).mkdir()
    refused(directory, f"{name} is missing; merge again")
    (directory / name).rmdir()
    (directory / name).touch()
    refused(directory, f"{name} has 0 bytes, but was written with {len(content)}; merge again")
    (directory / name).write_bytes(content)
    load(directory)


def test_experts_of_another_model_are_noticed(save: Save, pristine: Path, tmp_path: Path) -> None:
    save(tmp_path, 2.0)
    load(tmp_path)
    for name in ("experts.json", "experts.safetensors"):
        shutil.copy(pristine / name, tmp_path)
        for verify in (True, False):
            refused(tmp_path, f"{name} is there, but does not belong to this model", "merge again", verify=verify)


def test_all_changed_files_are_listed(directory: Path) -> None:
    for name in ("experts.json", "merge.json"):
        (directory / name).write_bytes((directory / name).read_bytes() + b"\n")
    refused(directory, "2 faults", "merge.json was changed", "experts.json has", "or set `verify` to false")
    load(directory, verify=False)


def test_an_edited_model_card_is_mentioned_and_no_obstacle(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    (directory / "README.md").write_text("# Mine\n")
    with caplog.at_level("WARNING", logger="mergekit_vision"):
        load(directory)
        (directory / "README.md").unlink()
        load(directory)
    assert "README.md has 7 bytes, but was written with" in caplog.text
    assert "README.md is missing" in caplog.text


def test_a_model_of_an_earlier_version_can_be_used_unchecked(directory: Path) -> None:
    edit(directory / "merge.json", lambda record: [record.pop(key) for key in ("schema", "files", "sha256")])
    refused(directory, "merged by an earlier version, which recorded no checksums", "merge again, or set `verify` to false")
    load(directory, verify=False)


def test_a_merge_that_was_cut_off_says_so(tmp_path: Path) -> None:
    (tmp_path / ".mergekit-vision" / "set").mkdir(parents=True)
    refused(tmp_path, "a merge was cut off while it wrote the model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(scale="large"), "scale: must be a number, not the str 'large'; merge again"),
        (lambda r: r.update(scale=float("nan")), "scale: "),
        (lambda r: r.update(scale=None), "scale: must be a number, not empty"),
        (lambda r: r.pop("experts"), "`experts` is missing"),
        (lambda r: r.update(experts=["a"]), "experts: must be a mapping, not the list ['a']"),
        (lambda r: r.update(experts={}), "experts: must be at least one entry long"),
        (lambda r: r.update(experts={"a": 1}), "experts.a: must be text, not the int 1"),
        (lambda r: r.update(merger="TIES"), "merger: must be a mapping"),
        (lambda r: r["merger"].update(init_args=[]), "merger.init_args: must be a mapping, not the list []"),
        (lambda r: r.update(search=[{"coefficient": "1"}]), "must be a number"),
        (lambda r: r.update(schema=2), "schema: must be 1, not the int 2"),
        (lambda r: r.update(citation={}), "citation: must be a list"),
        (lambda r: r.update(sede=1), "unknown key `sede`"),
        (
            lambda r: r["files"].update({"../suite.yaml": {"size": 1, "sha256": "0" * 64}}),
            "files: must name plain files, not the str '../suite.yaml'",
        ),
        (lambda r: r["files"]["README.md"].update(size=-1), "files.README.md.size: "),
        (lambda r: r["files"]["README.md"].update(sha256="0"), "files.README.md.sha256: must be 64 hexadecimal digits"),
    ],
)
def test_a_wrong_record_is_one_clear_error(directory: Path, change: Change, message: str) -> None:
    edit(directory / "merge.json", change)
    for verify in (True, False):
        refused(directory, "merge.json: ", message, verify=verify)


def first(change: Change) -> Change:
    """The same change of the first layer's entry."""
    return lambda layers: change(next(iter(layers.values())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first(lambda e: e["arguments"].update(top_k=0)), "`top_k` must be a whole number above 0, not the int 0"),
        (first(lambda e: e["arguments"].update(top_k=True)), "`top_k` must be a whole number above 0"),
        (first(lambda e: e["arguments"].update(top_k=1.5)), "`top_k` must be a whole number above 0"),
        (first(lambda e: e["arguments"].update(temperature=0)), "`temperature` must be a finite number above 0, not the int 0"),
        (first(lambda e: e["arguments"].update(temperature=-1.0)), "`temperature` must be a finite number above 0"),
        (first(lambda e: e["arguments"].update(temperature=float("nan"))), "`temperature` must be a finite number above 0"),
        (first(lambda e: e["arguments"].update(temperature=float("inf"))), "`temperature` must be a finite number above 0"),
        (first(lambda e: e["arguments"].update(temperature="hot")), "`temperature` must be a finite number above 0"),
        (first(lambda e: e["arguments"].update(gate=2)), "does not take its saved state"),
        (first(lambda e: e.update(arguments=[])), "arguments: must be a mapping"),
        (first(lambda e: e.update(evidence="guess")), "evidence: must be 'own', 'start', 'add', 'hold' or 'ahead'"),
        (first(lambda e: e.update(evidence="add")), "evidence is 'add', but no layer before it starts any"),
        (first(lambda e: e.update(router=3)), "router: must be text"),
        (first(lambda e: e.update(router="mergekit_vision.routers.LinearRouter")), "does not take its saved state"),
        (first(lambda e: e.pop("router")), "`router` is missing"),
        (lambda layers: layers.pop(next(iter(layers))), "has no layer for the tensor visual."),
        (lambda layers: layers.clear(), "has no layer for the tensor visual."),
        (lambda layers: layers.update(nowhere=next(iter(layers.values()))), "has no tensor nowhere.up"),
    ],
)
def test_wrong_routers_are_one_clear_error(directory: Path, change: Change, message: str) -> None:
    edit(directory / "experts.json", change)
    refused(directory, message, "merge again", verify=False)
    refused(directory, "experts.json ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: t.update({key: t[key].fill_(float("nan"))}), "holds NaN or infinity"),
        (lambda t, key: t.update({key: t[key].int()}), "is torch.int32, but must hold floating-point numbers"),
        (lambda t, key: t.update({key: t[key][:, :, :-1].contiguous()}), "do not fit each other"),
        (lambda t, key: t.update({key: t[key][0].contiguous()}), "do not fit each other"),
        (lambda t, key: t.update({key: t[key][:, :-1].contiguous()}), "in_proj: bias must be [T, d_out] = [3, 95], got [3, 96]"),
        (
            lambda t, key: t.update({key.replace(".up", ".router.basis"): t[key][:, :1, :1].contiguous()}),
            "its router does not run",
        ),
        (lambda t, key: t.update({key.replace(".up", ".router.more"): t[key].clone()}), "does not take its saved state"),
    ],
)
def test_wrong_tensors_of_experts_are_one_clear_error(directory: Path, change: Callable[..., object], message: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "experts.safetensors").items()}
    change(tensors, next(name for name in tensors if name.endswith("in_proj.up")))
    save_file(tensors, directory / "experts.safetensors")
    refused(directory, message, "merge again", verify=False)
    refused(directory, "experts.safetensors ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), "`model_cfg` is missing"),
        (lambda c: c["model_cfg"].update(quick_gelu="yes"), "model_cfg.quick_gelu: must be true or false"),
        (lambda c: c["model_cfg"].update(embed_dim="32"), "model_cfg.embed_dim: must be a whole number from 1 to 65536"),
        (lambda c: c["model_cfg"].update(text_cfg=3), "model_cfg.text_cfg: must be a mapping"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(layers=100_000), "model_cfg.vision_cfg.layers: must be a whole number"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(width=10**9), "model_cfg.vision_cfg.width: must be a whole number"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(width=1 << 14), "describes a model of "),
        (lambda c: c["model_cfg"]["vision_cfg"].update(head_width=7), "`head_width` 7 does not divide `width` 32"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(heads=2), "unexpected keyword argument 'heads'"),
        (lambda c: c["preprocess_cfg"].update(mean=[0.5, 0.5]), "preprocess_cfg.mean: "),
        (lambda c: c["preprocess_cfg"].update(std=[0.5, 0.5, 0]), "preprocess_cfg.std"),
        (lambda c: c["preprocess_cfg"].update(mean=[0.5, 0.5, float("nan")]), "preprocess_cfg.mean"),
        (lambda c: c["preprocess_cfg"].update(interpolation="cubic"), "preprocess_cfg.interpolation: "),
    ],
)
def test_a_wrong_configuration_is_one_clear_error(directory: Path, change: Change, message: str) -> None:
    edit(directory / "open_clip_config.json", change)
    refused(directory, message, verify=False)
    refused(directory, "open_clip_config.json ")


def test_links_out_of_the_directory_lead_to_files_that_are_checked_like_others(pristine: Path, tmp_path: Path) -> None:
    """So they lie in the cache of the Hugging Face hub."""
    for name in files_in(pristine):
        (tmp_path / name).symlink_to(pristine / name)
    load(tmp_path)
    (tmp_path / "experts.safetensors").unlink()
    (tmp_path / "experts.safetensors").symlink_to("/etc/passwd")
    refused(tmp_path, "experts.safetensors has ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", ["merge.json", "experts.json", "open_clip_model.safetensors", "open_clip_config.json"])
def test_nothing_waits_for_a_pipe(directory: Path, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)
    for verify in (True, False):
        refused(directory, name, verify=verify)


def test_deeply_nested_or_endless_json_is_refused(directory: Path) -> None:
    (directory / "experts.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"experts\.json: not valid JSON .*; merge again"):
        load_experts(directory)
    with (directory / "experts.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="far too many for what belongs there; merge again"):
        load_experts(directory)
