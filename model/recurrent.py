"""Gated DeltaNet (the recurrent layers of Qwen3.5) over rows laid end to end, of which none reaches the next.

transformers' own layer keeps packed rows apart with the kernels of flash-linear-attention and causal-conv1d alone.
Without them convolution and recurrence take one row after the other: the same numbers, slower.
"""

from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version
from transformers.models.qwen3_5 import modeling_qwen3_5

# Packages of the kernels; before 0.5.0 the first one needs as many heads of keys as of values.
KERNELS = {"flash-linear-attention": "0.5.0", "causal-conv1d": "1.0"}
convolve, recur = modeling_qwen3_5.causal_conv1d_fn, modeling_qwen3_5.torch_chunk_gated_delta_rule


class PackedGatedDeltaNet(modeling_qwen3_5.Qwen3_5GatedDeltaNet):
    """In the place of transformers' own, with the same weights; without cu_seqlens it is that one."""

    by_kernels = False  # or one row after the other

    @torch.compiler.disable  # its loop depends on the rows, and the kernels are no graph of torch's
    def forward(self, hidden_states, cu_seqlens: torch.Tensor | None = None, max_seqlen: int = 0, **kwargs):
        """hidden_states (1, T, hidden_size) -> the same shape."""
        if cu_seqlens is None:
            return super().forward(hidden_states, **kwargs)
        if not self.by_kernels:
            return super().forward(hidden_states, row_lengths=lengths_of(cu_seqlens))
        lengths = cu_seqlens.diff()
        rows = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
        seq_idx = rows.repeat_interleave(lengths, output_size=hidden_states.shape[1])[None]
        return super().forward(hidden_states, cu_seq_lens_q=cu_seqlens, seq_idx=seq_idx)


def lengths_of(cu_seqlens: torch.Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()


def convolve_by_row(x, *weights, row_lengths: list[int] | None = None, **kwargs):
    """x (1, channels, T)."""
    if row_lengths is None:
        return convolve(x, *weights, **kwargs)
    return torch.cat([convolve(row, *weights, **kwargs) for row in x.split(row_lengths, dim=2)], dim=2)


def recur_by_row(query, key, value, g, beta, row_lengths: list[int] | None = None, **kwargs):
    """All (1, T, heads, ...)."""
    if row_lengths is None:
        return recur(query, key, value, g=g, beta=beta, **kwargs)
    rows = zip(*(x.split(row_lengths, dim=1) for x in (query, key, value, g, beta)), strict=True)
    out = [recur(q, k, v, g=decay, beta=rate, **kwargs)[0] for q, k, v, decay, rate in rows]
    return torch.cat(out, dim=1), None


def replace_recurrent_layers() -> None:
    """In every Qwen3.5 that transformers makes from now on. (Its own register_patch_mapping imports all it has.)"""
    modeling_qwen3_5.Qwen3_5GatedDeltaNet = PackedGatedDeltaNet
    modeling_qwen3_5.causal_conv1d_fn = convolve_by_row
    modeling_qwen3_5.torch_chunk_gated_delta_rule = recur_by_row


def use_kernels(device: torch.device) -> bool:
    """Has the recurrent layers take packed rows at once if the kernels are there, and returns whether they are."""
    PackedGatedDeltaNet.by_kernels = device.type == "cuda" and all(map(is_there, KERNELS.items()))
    return PackedGatedDeltaNet.by_kernels


def is_there(package: tuple[str, str]) -> bool:
    name, oldest = package
    try:
        return Version(version(name)) >= Version(oldest)
    except PackageNotFoundError:
        return False
