"""Attention over rows laid end to end: causal within each row, blind to its neighbours.

Registered with transformers by name; transformers builds no mask for a name it does not know and
hands `cu_seqlens` and `max_seqlen` through the model untouched.
"""

import inspect
import itertools

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
    if device == "cuda" and dtype != torch.float32:
        if dropout:
            raise ValueError("varlen_attn has no dropout: set attention_dropout to 0 in the model's config.json")
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        ends, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
        out = varlen_attn(q, k, v, *ends, *longest, scale=scaling, window_size=(-1, 0), **GROUPED)  # causal
        return out.unsqueeze(0), None
    if device == "cpu" and not dropout:
        return cpu_attention(query, key, value, cu_seqlens, scaling)[0], None
    # Heads are repeated, for the kernel that keeps no scores in fp32 knows no groups of them.
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    lengths = cu_seqlens.diff().tolist()
    rows = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout)
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2), None


# The kernel behind scaled_dot_product_attention on CPUs, row by row. As one operator it leaves the compiled
# graph of a layer whole, for the number of rows and their lengths stay out of it.
@torch.library.custom_op("qwen3_loop::cpu_attention", mutates_args=())
def cpu_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As packed_attention; returns its output and the logsumexp (1, heads, T) of the scores, for the backward."""
    out, logsumexp = cpu_attention_shapes(query, key, value, cu_seqlens, scale)
    for row in rows_of(cu_seqlens):
        q, k, v = query[:, :, row], key[:, :, row], value[:, :, row]
        row_out, row_logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=True, scale=scale
        )
        out[:, row], logsumexp[:, :, row] = row_out.transpose(1, 2), row_logsumexp
    return out, logsumexp


@cpu_attention.register_fake
def cpu_attention_shapes(query, key, value, cu_seqlens, scale):
    _, heads, length, head_dim = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(1, length, heads, head_dim), query.new_empty(1, heads, length, dtype=dtype)


@torch.library.custom_op("qwen3_loop::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    for row in rows_of(cu_seqlens):
        parts = [tensor[:, :, row] for tensor in (grad, query, key, value, out, logsumexp)]
        row_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, dropout_p=0.0, is_causal=True, scale=scale
        )
        for whole, part in zip(grads, row_grads, strict=True):
            whole[:, :, row] = part
    return grads


@cpu_attention_backward.register_fake
def cpu_attention_backward_shapes(grad, query, key, value, cu_seqlens, out, logsumexp, scale):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))


def rows_of(cu_seqlens: torch.Tensor) -> list[slice]:
    ends = cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends) if end > start]


def keep_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def backward(ctx, grad, _):
    return *cpu_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


cpu_attention.register_autograd(backward, setup_context=keep_for_backward)
AttentionInterface.register(PACKED, packed_attention)
