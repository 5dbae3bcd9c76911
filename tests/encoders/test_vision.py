"""The vision tower: linearized, described, and run with other weights."""

import copy
from pathlib import Path

import open_clip
import pytest
import torch
from tolerances import assert_near, forward
from torch import nn

from mergekit_vision.encoders.backbone import load_clip
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.merger import LinearInfo
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
    assert_near(encoder.encode_image(images()), expected, forward(2 * 8 + 2, 128))
    assert set(encoder.weights()) == keys


def test_every_linear_is_hooked_in_forward_order(backbone: str) -> None:
    encoder, seen = VisionEncoder(load_clip(backbone).visual), []
    names = [linear.name for linear in encoder.linears]
    for name in names:
        encoder.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    encoder(images())
    assert seen == names
    assert {key for linear in encoder.linears for key in (linear.weight, linear.bias)} <= set(encoder.weights())
    depths = encoder.depths
    assert depths.keys() == encoder.weights().keys()
    assert all(depths[linear.weight] == linear.block for linear in encoder.linears)
    assert [depths[f"visual.{key}"] for key in ("conv1.weight", "ln_pre.bias", "ln_post.bias", "proj")] == [-1, -1, 2, 2]
    assert [(linear.block, linear.kind) for linear in encoder.linears] == [
        (block, kind) for block in range(2) for kind in ("in_proj", "out_proj", "c_fc", "c_proj")
    ]


@torch.no_grad()
def test_assigned_weights_are_what_runs_and_the_backbone_survives(backbone: str) -> None:
    clip = load_clip(backbone)
    other, generator = copy.deepcopy(clip), torch.Generator().manual_seed(0)
    for parameter in other.visual.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    encoder = VisionEncoder(clip.visual)
    base = encoder.weights()
    before = {key: value.clone() for key, value in base.items()}
    encoder.assign({key: value for key, value in other.state_dict().items() if key.startswith("visual.")})
    assert_near(encoder(images()), other.encode_image(images()), forward(2 * 8 + 2, 128))
    encoder.assign(base)
    assert all(torch.equal(encoder.weights()[key], value) for key, value in before.items())


def test_layers_are_described_as_data(backbone: str) -> None:
    encoder = VisionEncoder(load_clip(backbone).visual)
    attention, mlp = (f"visual.transformer.resblocks.1.{owner}" for owner in ("attn", "mlp"))
    assert encoder.linears[4:] == (
        LinearInfo(f"{attention}.in_proj", f"{attention}.in_proj_weight", f"{attention}.in_proj_bias", "in_proj", 1),
        LinearInfo(f"{attention}.out_proj", f"{attention}.out_proj.weight", f"{attention}.out_proj.bias", "out_proj", 1),
        LinearInfo(f"{mlp}.c_fc", f"{mlp}.c_fc.weight", f"{mlp}.c_fc.bias", "c_fc", 1),
        LinearInfo(f"{mlp}.c_proj", f"{mlp}.c_proj.weight", f"{mlp}.c_proj.bias", "c_proj", 1),
    )
    for linear in encoder.linears:
        module = encoder.get_submodule(linear.name)
        assert isinstance(module, nn.Linear)
        assert torch.equal(encoder.weights()[linear.weight], module.weight)
        assert torch.equal(encoder.weights()[linear.bias], module.bias)


def test_a_layer_without_a_bias_says_so(backbone: str) -> None:
    encoder = VisionEncoder(load_clip(backbone).visual)
    encoder.get_submodule(encoder.linears[2].name).bias = None
    assert [linear.bias is None for linear in encoder.linears] == [False, False, True] + [False] * 5
