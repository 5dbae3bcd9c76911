import copy
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from mergekit_vision.encoders.backbone import describe_backbone, load_clip
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.errors import InputError
from mergekit_vision.merger import Merged, merged_weights
from mergekit_vision.suites.suite import Suite

CONFIG = {"image_size": 16, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


def images(n: int = 5, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def backbone(tiny_suite: Path) -> str:
    return Suite.load(tiny_suite).backbone


@pytest.mark.parametrize(
    "vision", [{}, {"ls_init_value": 0.1}, {"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 4}]
)
@torch.no_grad()
def test_linearized_tower_computes_the_same(vision: dict) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(24, CONFIG | vision, TEXT, quick_gelu=True).eval()
    for parameter in model.visual.parameters():  # the untrained biases are zero, which would hide a mistake
        nn.init.normal_(parameter, std=0.2)
    expected = model.encode_image(images())
    keys = {key for key in model.state_dict() if key.startswith("visual.")}
    encoder = VisionEncoder(model.visual)
    torch.testing.assert_close(encoder.encode_image(images()), expected, rtol=1e-5, atol=1e-6)
    assert set(encoder.weights()) == keys


def test_every_linear_is_hooked_in_forward_order(backbone: str) -> None:
    encoder, seen = VisionEncoder(load_clip(backbone).visual), []
    names = [linear.name for linear in encoder.linears]
    for name in names:
        encoder.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    encoder(images())
    assert seen == names
    assert {key for linear in encoder.linears for key in (linear.weight, linear.bias)} <= set(encoder.weights())
    assert [(linear.block, linear.kind) for linear in encoder.linears] == [
        (block, kind) for block in range(2) for kind in ("in_proj", "out_proj", "c_fc", "c_proj")
    ]


@torch.no_grad()
def test_assigned_weights_are_what_runs_and_the_backbone_survives(backbone: str) -> None:
    clip = load_clip(backbone)
    other = copy.deepcopy(clip)
    for parameter in other.visual.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    encoder = VisionEncoder(clip.visual)
    base = encoder.weights()
    before = {key: value.clone() for key, value in base.items()}
    encoder.assign({key: value for key, value in other.state_dict().items() if key.startswith("visual.")})
    torch.testing.assert_close(encoder(images()), other.encode_image(images()), rtol=1e-5, atol=1e-6)
    encoder.assign(base)
    assert all(torch.equal(encoder.weights()[key], value) for key, value in before.items())


def test_merged_weights_scale_all_but_the_fixed_keys() -> None:
    base = {"visual.a": torch.tensor([1.0]), "visual.b": torch.tensor([1.0]), "visual.c": torch.tensor([1.0])}
    merged = Merged({"visual.a": torch.tensor([2.0]), "visual.b": torch.tensor([2.0])}, scale=0.5, fixed=frozenset({"visual.b"}))
    assert {key: value.item() for key, value in merged_weights(base, merged).items()} == {
        "visual.a": 2.0,
        "visual.b": 3.0,
        "visual.c": 1.0,
    }
    assert merged_weights(base, merged, 3.0)["visual.a"].item() == 7.0
    assert base["visual.a"].item() == 1.0
    assert merged.update["visual.a"].item() == 2.0


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
