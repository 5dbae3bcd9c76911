"""Routed experts as tensors and plain data, and back."""

import json
import sys
from pathlib import Path

import pytest
import torch
from routed_encoder import KINDS, LINEARS, RANK, make_encoder, make_experts, make_routed, normal
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_vision.encoders.routed import attach
from mergekit_vision.errors import InputError
from mergekit_vision.export.experts import pack_experts, unpack_experts


@pytest.fixture
def images() -> Tensor:
    return normal(7, 3, 16, 16, seed=9)


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_come_back_bit_for_bit(kind: str, evidence: bool, images: Tensor, tmp_path: Path) -> None:
    encoder, routing = make_routed(kind, evidence=evidence)
    tensors, config = pack_experts({name: layer.experts for name, layer in routing.layers.items()})
    save_file(tensors, tmp_path / "experts.safetensors")
    again = unpack_experts(load_file(tmp_path / "experts.safetensors"), json.loads(json.dumps(config)))
    fresh = make_encoder()
    attach(fresh, again)
    with torch.inference_mode():
        assert torch.equal(fresh["visual"](images), encoder["visual"](images))


def test_experts_of_different_ranks_come_back_bit_for_bit(images: Tensor) -> None:
    experts = make_experts(make_encoder(), "cosine")
    for at, layer in enumerate(experts.values()):
        for t in range(at, len(layer.up)):
            layer.up[t, :, 2 + t :] = layer.down[t, 2 + t :] = 0
    tensors, config = pack_experts(experts)
    assert config[LINEARS[0]]["ranks"] == [2, 3, 4]
    assert "ranks" not in config[LINEARS[-1]]
    config, whole = json.loads(json.dumps(config)), make_encoder()
    attach(whole, experts)
    with pytest.raises(InputError, match=r"in_proj: up \[d_out, r\] .* do not fit"):
        unpack_experts(tensors, config | {LINEARS[0]: config[LINEARS[0]] | {"ranks": [3, 2, 3]}})
    again = unpack_experts(tensors, config)
    fresh = make_encoder()
    attach(fresh, again)
    with torch.inference_mode():
        assert torch.equal(fresh["visual"](images), whole["visual"](images))


def test_bfloat16_factors_come_back_in_half_the_bytes(images: Tensor, tmp_path: Path) -> None:
    """Also those of experts of different ranks, with whatever router."""
    experts = {}
    for at, (name, layer) in enumerate(make_experts(make_encoder(), "linear of covariance, mixed").items()):
        layer.up[0, :, 1 + at % RANK :] = layer.down[0, 1 + at % RANK :] = 0
        experts[name] = layer.rounded("bfloat16")
    tensors, config = pack_experts(experts)
    whole, _ = pack_experts({name: layer.rounded("float32") for name, layer in experts.items()})
    for name, tensor in tensors.items():
        assert tensor.nbytes * (2 if name.endswith((".up", ".down")) else 1) == whole[name].nbytes
    save_file(tensors, tmp_path / "experts.safetensors")
    again = unpack_experts(load_file(tmp_path / "experts.safetensors"), json.loads(json.dumps(config)))
    fresh, encoder = make_encoder(), make_encoder()
    attach(fresh, again)
    attach(encoder, experts)
    assert all(layer.up.dtype == layer.down.dtype == torch.bfloat16 for layer in again.values())
    with torch.inference_mode():
        assert torch.equal(fresh["visual"](images), encoder["visual"](images))


def test_unpack_explains_what_is_wrong() -> None:
    encoder = make_encoder()
    tensors, config = pack_experts(make_experts(encoder, "cosine"))
    name = LINEARS[0]
    with pytest.raises(InputError, match=r"no tensor .*in_proj\.down"):
        unpack_experts({key: value for key, value in tensors.items() if key != f"{name}.down"}, config)
    for router, message in (
        ("nowhere.Router", "router nowhere.Router cannot be imported"),
        ("torch.nn.Linear", "is not a Router"),
        ("os.system", "is not a Router"),
        ("mergekit_vision.routers.Nothing", "cannot be imported"),
    ):
        with pytest.raises(InputError, match=message):
            unpack_experts(tensors, {name: {**config[name], "router": router}}, allow_code=True)
    with pytest.raises(InputError, match="does not take its saved state"):
        unpack_experts(tensors, {name: {**config[name], "arguments": {"size": 1}}})


def test_only_registered_routers_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, config = pack_experts(make_experts(make_encoder(), "cosine"))
    (tmp_path / "evil.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("evil.Router", "os.system", "torch.nn.Linear"):
        with pytest.raises(InputError, match=f"router {path} is registered by no installed package.*--allow-code"):
            unpack_experts(tensors, {LINEARS[0]: {**config[LINEARS[0]], "router": path}})
    assert "evil" not in sys.modules
