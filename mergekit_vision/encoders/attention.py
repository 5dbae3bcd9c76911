"""Attention made of plain Linears."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearAttention(nn.Module):
    """Multi-head self-attention whose projections are plain ``nn.Linear`` modules.

    ``nn.MultiheadAttention`` keeps query, key and value in one bare parameter and never calls ``out_proj`` as a module, so that
    neither can be hooked or replaced. This module computes the same thing with two Linears, over the tokens of each image.

    Args:
        dim: width of the tokens.
        heads: number of attention heads; divides ``dim``.
        bias: whether both projections have a bias.
    """

    def __init__(self, dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(dim, 3 * dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)

    @classmethod
    def from_multihead(cls, attention: nn.MultiheadAttention) -> "LinearAttention":
        """The same attention, sharing the parameters of ``attention``.

        Raises:
            ValueError: for what CLIP's vision blocks never use: separate widths, added key-value biases, dropout.
        """
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn or attention.dropout:
            raise ValueError("only plain self-attention of one width, without dropout, can be made of Linears")
        with torch.device("meta"):
            new = cls(attention.embed_dim, attention.num_heads, bias=attention.in_proj_bias is not None)
        new.in_proj.weight, new.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        new.out_proj.weight, new.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend over the tokens of each image.

        Takes what open_clip's blocks pass to ``nn.MultiheadAttention``; ``query`` is the only input, ``[N, L, dim]``.

        Returns:
            The output, ``[N, L, dim]``, and ``None`` in the place of the attention weights.
        """
        n, tokens, dim = query.shape
        q, k, v = self.in_proj(query).view(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(out.transpose(1, 2).reshape(n, tokens, dim)), None
