"""Attention made of Linears against PyTorch's own."""

import pytest
import torch
from routed_encoder import normal
from tolerances import assert_near, forward
from torch import nn

from mergekit_vision.encoders.attention import LinearAttention


def attention(**options: object) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(32, 4, batch_first=True, **options).eval()
    for seed, parameter in enumerate(made.parameters()):  # the untrained biases are zero, which would hide a mistake
        parameter.data = 0.2 * normal(*parameter.shape, seed=seed)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_it_is_the_same_attention_with_the_same_parameters(bias: bool, masked: bool) -> None:
    theirs, x = attention(bias=bias), normal(3, 7, 32, seed=9)
    mask = torch.full((7, 7), -torch.inf).triu(1) if masked else None
    ours = LinearAttention.from_multihead(theirs)
    assert_near(ours(x, x, x, attn_mask=mask)[0], theirs(x, x, x, attn_mask=mask, need_weights=False)[0], forward(4, 32))
    assert ours.in_proj.weight is theirs.in_proj_weight
    assert ours.out_proj.weight is theirs.out_proj.weight
    assert (ours.in_proj.bias is None) == (ours.out_proj.bias is None) == (not bias)


@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 16, "vdim": 16}])
def test_what_clip_never_uses_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="only plain self-attention of one width"):
        LinearAttention.from_multihead(attention(**options))
