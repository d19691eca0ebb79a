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

    On CUDA one varlen kernel serves all rows; elsewhere each row is one scaled_dot_product_attention.
    """
    if query.device.type == "cuda":
        return varlen_cuda(query, key, value, scaling, dropout, cu_seqlens, max_seqlen), None
    lengths = cu_seqlens.diff().tolist()
    rows = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2), None


def varlen_cuda(query, key, value, scaling, dropout, cu_seqlens, max_seqlen) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("attention_dropout is not possible on CUDA: varlen_attn has none. Set it to 0 in config.json")
    # The norms' fp32 weights make query and key fp32 under autocast, and the kernel takes bf16 only.
    dtype = torch.bfloat16 if query.dtype == torch.float32 else query.dtype
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    # torch 2.11 groups heads by itself and has no such argument; from 2.12 on it must be asked for.
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    causal = (-1, 0)
    return varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=causal,
        **gqa,
    ).unsqueeze(0)


AttentionInterface.register(PACKED, packed_attention)
