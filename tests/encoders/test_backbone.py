"""Pre-trained models: what is known of one, and what is refused."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_vision.checkpoints.safetensors_file import SafetensorsFile
from mergekit_vision.encoders.backbone import describe_backbone, load_clip, load_tokenizer, stored_weights
from mergekit_vision.errors import InputError
from mergekit_vision.suites.suite import Suite


@pytest.fixture
def backbone(tiny_suite: Path) -> str:
    return Suite.load(tiny_suite).backbone


def test_description_reads_no_weight(backbone: str) -> None:
    described, clip = describe_backbone(backbone), load_clip(backbone)
    expected = {key: tuple(value.shape) for key, value in clip.state_dict().items() if key.startswith("visual.")}
    assert described.shapes == expected
    assert described.preprocess == clip.visual.preprocess_cfg
    vit = describe_backbone("ViT-B-32-quickgelu", "openai")
    assert vit.shapes["visual.proj"] == (768, 512)
    assert vit.preprocess["mean"] == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-32", "openai", "use ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "tags"),
        ("ViT-B-33", None, "does not know"),
        ("RN50-quickgelu", "openai", "not one of open_clip's own ViTs"),
        ("local-dir:nowhere", None, "nowhere"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_one_clear_error(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        describe_backbone(name, pretrained)


def test_weights_must_be_named_for_a_built_in_model() -> None:
    with pytest.raises(InputError, match="pretrained"):
        load_clip("ViT-B-32-quickgelu")


def test_a_loaded_model_is_float32_on_the_cpu_and_does_not_train(backbone: str) -> None:
    clip = load_clip(backbone)
    assert not clip.training
    assert {(parameter.dtype, parameter.device.type, parameter.requires_grad) for parameter in clip.parameters()} == {
        (torch.float32, "cpu", False)
    }
    assert load_tokenizer(backbone)(["a cat", "a dog"]).shape == (2, 24)


def test_loading_says_nothing_and_leaves_logging_as_it_was(backbone: str, capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.level, list(root.handlers), list(root.filters), logging.root.manager.disable
    load_clip(backbone)
    with pytest.raises(InputError):
        describe_backbone("local-dir:nowhere")
    assert (root.level, list(root.handlers), list(root.filters), logging.root.manager.disable) == before
    assert capfd.readouterr() == ("", "")


def test_memory_that_runs_out_is_no_mistake_of_the_user(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("open_clip.create_model", full)
    with pytest.raises(MemoryError):
        load_clip(backbone)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visual.proj", torch.nan, "holds NaN or infinity"),
        ("visual.proj", 3e38, r"holds values up to 3e\+38, above 65504"),
        ("text_projection", torch.inf, "holds NaN or infinity"),
        ("token_embedding.weight", -1e9, r"holds values up to 1e\+09, above 65504"),
    ],
)
def test_weights_that_cannot_be_run_are_refused(root: Path, key: str, value: float, message: str) -> None:
    path = root / "base" / "open_clip_model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    weights[key].view(-1)[-1] = value
    save_file(weights, path)
    with pytest.raises(InputError, match=rf"backbone local-dir:{root}/base: {key} {message}; copy or download"):
        load_clip(f"local-dir:{root / 'base'}")


def test_a_changed_configuration_is_read_again(root: Path) -> None:
    name, path = f"local-dir:{root / 'base'}", root / "base" / "open_clip_config.json"
    assert not describe_backbone(name).tower["quick_gelu"]
    path.write_text(path.read_text().replace('"quick_gelu": false', '"quick_gelu": true'))
    assert describe_backbone(name).tower["quick_gelu"]


def test_weights_of_another_size_are_one_line(root: Path) -> None:
    path = root / "base" / "open_clip_config.json"
    path.write_text(path.read_text().replace('"embed_dim": 32', '"embed_dim": 48'))
    with pytest.raises(InputError, match="size mismatch for") as caught:
        load_clip(f"local-dir:{root / 'base'}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_in_float32_are_mapped_from_their_file(dtype: torch.dtype, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Suite.load(root / "suite.yaml").backbone
    file = root / "base" / "open_clip_model.safetensors"
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file, {"format": "pt"})
    before, read, stored = file.read_bytes(), SafetensorsFile.read, dict[str, Tensor]()
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: stored.setdefault(name, read(self, name)))
    clip = load_clip(backbone)
    for name, parameter in clip.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, stored[name].float())
        assert (parameter.data_ptr() == stored[name].data_ptr()) == (dtype == torch.float32)
        parameter.zero_()
    assert file.read_bytes() == before, "what is written to them is not written to it"


def test_only_a_directorys_own_file_is_mapped(root: Path) -> None:
    base = root / "base"
    assert stored_weights("ViT-B-32") is None
    assert stored_weights(f"local-dir:{base}") is not None
    (base / "open_clip_model.safetensors").write_bytes(b"what open_clip may not have read")
    assert stored_weights(f"local-dir:{base}") is None
