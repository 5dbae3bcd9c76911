"""Exports, loaded by their own libraries alone, against the merged models; and what is refused."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import READERS, by_open_clip, without_this_package
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from mergekit_vision import InputError, load
from mergekit_vision.export import formats
from mergekit_vision.export.exporting import export_model
from mergekit_vision.export.open_clip_directory import OpenClip

Merged = Callable[[str], Path]
Exported = Callable[[str, str], Path]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("ESM", "huggingface"),
        ("ESM", "open_clip"),
        ("ESM", "torch"),
        ("ESMPP", "torch"),
        ("ESMPPBayes", "onnx"),
        ("SMILE", "onnx"),
        ("bfloat16", "torch"),
        ("once", "torch"),
        pytest.param("ESM", "onnx", marks=pytest.mark.slow),
        pytest.param("ESMPP", "onnx", marks=pytest.mark.slow),
        pytest.param("bfloat16", "onnx", marks=pytest.mark.slow),
        pytest.param("ESMPPBayes", "torch", marks=pytest.mark.slow),
        pytest.param("SMILE", "torch", marks=pytest.mark.slow),
        pytest.param("once", "onnx", marks=pytest.mark.slow),
    ],
)
def test_predictions_are_those_of_the_merged_model(name: str, to: str, merged: Merged, exported: Exported) -> None:
    directory = exported(name, to)
    images, head = normal(256, 3, 16, 16), normal(10, 32)
    with torch.no_grad():
        expected = load(merged(name))(images)
        with without_this_package(*([] if to == "open_clip" else ["open_clip"])):
            embed = READERS[to](directory)
            found = torch.cat([embed(part) for part in images.split([1, 5, 120, 130])])
    equal = (F.normalize(found, dim=-1) @ head.T).argmax(1) == (F.normalize(expected, dim=-1) @ head.T).argmax(1)
    assert equal.float().mean() >= 0.999
    assert (expected - base(merged(name), images)).norm() > 1e-2 * expected.norm() or name == "ESM", "the experts do nothing"


def test_a_model_written_over_meanwhile_is_not_exported(merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copytree(merged("ESM"), tmp_path / "model"))
    write = OpenClip.write

    def late(*arguments: Any) -> None:
        write(*arguments)
        shutil.copytree(merged("ESMPP"), model, dirs_exist_ok=True)

    monkeypatch.setattr(OpenClip, "write", late)
    with pytest.raises(InputError, match="model: another model was written here while this one was read; run this again"):
        export_model(model, "open_clip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def base(directory: Path, images: Tensor) -> Tensor:
    """Embeddings of a dynamic model's static base."""
    encoder = load(directory)
    if encoder.routing is not None:
        encoder.routing.mode = "base"
    with torch.no_grad():
        return encoder(images)


def test_the_static_base_alone(merged: Merged, tmp_path: Path) -> None:
    export_model(merged("ESMPP"), "open_clip", tmp_path / "base", base_only=True)
    images = normal(9, 3, 16, 16)
    with torch.no_grad():
        found = by_open_clip(tmp_path / "base")(images)
    assert (found - base(merged("ESMPP"), images)).norm() < 1e-5 * found.norm()
    assert {path.name for path in (tmp_path / "base").iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "export.json",
    }


@pytest.mark.parametrize("to", [name for name, form in formats.FORMATS.items() if not form.routed])
def test_a_dynamic_model_is_refused_where_its_experts_have_no_room(to: str, merged: Merged, tmp_path: Path) -> None:
    others = ", ".join(name for name, form in formats.FORMATS.items() if form.routed)
    assert "onnx, torch" in others
    with pytest.raises(InputError, match=rf"is a dynamic model, .*take one of {others}, or .*`base_only`") as caught:
        export_model(merged("SMILE"), to, tmp_path / "out")
    assert caught.value.of == "command"
    assert not (tmp_path / "out").exists()


def test_all_that_is_wrong_with_a_request_is_said_at_once(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError) as caught:
        export_model(merged("ESMPP"), "huggingface", tmp_path / "out", device="nowhere")
    lines = str(caught.value).splitlines()
    assert "`output`" in lines[0]
    assert "is a file; name a directory" in lines[0]
    assert "`device` nowhere: cannot be used" in lines[1]
    assert "needs transformers; pip install 'mergekit-vision[hf]'" in lines[2]
    assert "dynamic model" in lines[3]
    with pytest.raises(InputError, match=r"`to` torsh: not a format \(did you mean `torch`\?\); the formats are huggingface,"):
        export_model(merged("ESM"), "torsh", tmp_path / "new")
    with pytest.raises(InputError, match="not a merged model"):
        export_model(tmp_path, "torch", tmp_path / "new")


def test_only_what_export_wrote_is_replaced(merged: Merged, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with caplog.at_level(logging.INFO, logger="mergekit_vision"):
        export_model(merged("ESM"), "open_clip", output)
        assert "replaces" not in caplog.text
        export_model(merged("ESM"), "open_clip", output)
    suite = json.loads((merged("ESM") / "merge.json").read_text())["suite"]
    assert f"{output}: replaces the open_clip export of ESM on {suite}" in caplog.messages
    content = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / "notes").mkdir()
    (output / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds files that export did not write \(notes/mine\.txt\); name another"):
        export_model(merged("ESM"), "open_clip", output)
    (output / "notes" / "mine.txt").unlink()
    (output / "notes").rmdir()
    (output / "open_clip_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"did not write \(open_clip_config\.json\)"):
        export_model(merged("ESM"), "open_clip", output)
    (output / "open_clip_config.json").write_bytes(content["open_clip_config.json"])
    export_model(merged("ESM"), "open_clip", output)
    (output / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"did not write \(link\)"):
        export_model(merged("ESM"), "open_clip", output)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "export.json").write_text('{"format": "video"}')
    for own in (merged("ESM"), tmp_path, tmp_path / "theirs"):
        with pytest.raises(InputError, match="holds files that export did not write"):
            export_model(merged("ESM"), "open_clip", own)


def test_an_export_that_computes_something_else_is_an_error_and_not_there(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(merged("ESM"), "open_clip", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write = OpenClip.write

    def spoiled(self: OpenClip, model: object, directory: Path) -> None:
        write(self, model, directory)  # type: ignore[arg-type]
        file = directory / "open_clip_config.json"
        file.write_text(file.read_text().replace('"quick_gelu": false', '"quick_gelu": true'))

    monkeypatch.setattr(OpenClip, "write", spoiled)
    for output in ("new", "out"):
        with pytest.raises(
            InputError, match=r"open_clip: embeddings of what was written differ .* more than 1e-05; it was removed"
        ):
            export_model(merged("ESM"), "open_clip", tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error")])
def test_a_disk_that_is_full_is_one_line_and_leaves_what_was_there(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(OpenClip, "write", full)
    with pytest.raises(InputError, match=r"^`output` .*/out: cannot be written \((No space left|I/O error).*unchanged$"):
        export_model(merged("ESM"), "open_clip", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_record_says_what_was_exported(exported: Exported) -> None:
    directory = exported("ESM", "torch")
    record = json.loads((directory / "export.json").read_text())
    assert (record["format"], record["base_only"]) == ("torch", False)
    assert 0 <= record["difference"] < 1e-5
    assert record["merge"] == {"suite": "tiny", "method": "ESM", "scale": 0.7}
    assert set(record["files"]) == {"model.pt2", "preprocess.json"}
    assert json.loads((directory / "preprocess.json").read_text()) == {
        "size": [16, 16],
        "mode": "RGB",
        "mean": [0.48, 0.46, 0.41],
        "std": [0.27, 0.26, 0.28],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }


def test_a_program_names_no_file_of_this_machine(exported: Exported) -> None:
    content = (exported("ESMPP", "torch") / "model.pt2").read_bytes()
    assert not any(str(place).encode() in content for place in (Path(__file__).parents[2], Path(torch.__file__).parent))
