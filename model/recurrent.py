"""Gated DeltaNet (the recurrent layers of Qwen3.5) over rows laid end to end, of which none reaches the next.

transformers' own layer keeps packed rows apart with the kernels of flash-linear-attention and causal-conv1d alone.
Without them each row goes through the layer by itself: the same numbers, slower. The other layers stay packed.
"""

import logging
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version
from transformers.models.qwen3_5 import modeling_qwen3_5

# Packages of the kernels; before 0.5.0 the first one needs as many heads of keys as of values.
KERNELS = {"flash-linear-attention": "0.5.0", "causal-conv1d": "1.0"}
# Its warning that there are no kernels; the start of a run says so.
logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)


class PackedGatedDeltaNet(modeling_qwen3_5.Qwen3_5GatedDeltaNet):
    """In the place of transformers' own, with the same weights; without cu_seqlens it is that one."""

    by_kernels = False  # or one row after the other

    @torch.compiler.disable  # its loop depends on the rows, and the kernels are no graph of torch's
    def forward(self, hidden_states, cu_seqlens: torch.Tensor | None = None, max_seqlen: int = 0, **kwargs):
        """hidden_states (1, T, hidden_size) -> the same shape."""
        if cu_seqlens is None:
            return super().forward(hidden_states, **kwargs)
        if self.by_kernels:
            lengths = cu_seqlens.diff()
            rows = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
            seq_idx = rows.repeat_interleave(lengths, output_size=hidden_states.shape[1])[None]
            return super().forward(hidden_states, cu_seq_lens_q=cu_seqlens, seq_idx=seq_idx)
        rows = hidden_states.split(lengths_of(cu_seqlens), dim=1)
        return torch.cat([super(PackedGatedDeltaNet, self).forward(row) for row in rows], dim=1)


def lengths_of(cu_seqlens: torch.Tensor) -> list[int]:
    return cu_seqlens.diff().tolist()


def replace_recurrent_layers() -> None:
    """In every Qwen3.5 that transformers makes from now on. (Its own register_patch_mapping imports all it has.)"""
    modeling_qwen3_5.Qwen3_5GatedDeltaNet = PackedGatedDeltaNet


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
