"""Attention over rows laid end to end: causal within each row, blind to its neighbours.

Registered with transformers by name; transformers builds no mask for a name it does not know and
hands `cu_seqlens` and `max_seqlen` through the model untouched.
"""

import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

PACKED = "packed"
# torch 2.11 groups heads by itself and has no such argument; from 2.12 on it must be asked for.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


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
    device = query.device.type
    # Under autocast the norms' fp32 weights make query and key fp32 all the same.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if device != "cuda" or dtype == torch.float32:
        return attend_row_by_row(query, key, value, cu_seqlens, scaling, dropout), None
    if dropout:
        raise ValueError("varlen_attn has no dropout: set attention_dropout to 0 in the model's config.json")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    ends, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    out = varlen_attn(q, k, v, *ends, *longest, scale=scaling, window_size=(-1, 0), **GROUPED)  # causal
    return out.unsqueeze(0), None


@torch.compiler.disable  # its loop depends on the rows, so a graph of it would serve one batch
def attend_row_by_row(query, key, value, cu_seqlens: torch.Tensor, scaling: float, dropout: float) -> torch.Tensor:
    """As packed_attention."""
    on_cpu = query.device.type == "cpu"
    if not on_cpu:  # the memory-efficient fp32 kernel has no GQA support
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    lengths = cu_seqlens.diff().tolist()
    rows = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=on_cpu)
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2)


AttentionInterface.register(PACKED, packed_attention)
