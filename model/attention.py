"""Attention over rows laid end to end: causal within each row, blind to its neighbours.

Registered with transformers by name; transformers builds no mask for a name it does not know and
hands `cu_seqlens` and `max_seqlen` through the model untouched.
"""

import inspect

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

PACKED = "packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    dropout: float = 0.0,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    **_,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, head_dim), key and value (1, kv_heads, T, head_dim) -> (1, T, heads, head_dim).

    In half precision on CUDA one varlen kernel serves all rows; elsewhere, and in fp32, which that kernel
    does not take, each row is one scaled_dot_product_attention.
    """
    if query.device.type == "cuda":
        # Under autocast the norms' fp32 weights make query and key fp32 all the same.
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        if dtype != torch.float32:
            query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
            return varlen(query, key, value, scaling, dropout, cu_seqlens, max_seqlen).unsqueeze(0), None
    lengths = cu_seqlens.diff().tolist()
    rows = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def varlen(query, key, value, scaling, dropout, cu_seqlens, max_seqlen) -> torch.Tensor:
    """(T, heads, head_dim) each, in half precision -> the same"""
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("varlen_attn has no dropout: set attention_dropout to 0 in the model's config.json")
    # torch 2.11 groups heads by itself and has no such argument; from 2.12 on it must be asked for.
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=(-1, 0),  # causal
        **gqa,
    )


AttentionInterface.register(PACKED, packed_attention)
