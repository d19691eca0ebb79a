"""SFTModel: the wrapped forward returns summed losses, never logits."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Targets whose logits exist at one time: 1,024 of Qwen3's 151,936-word logits are 0.6 GB in fp32.
CHUNK = 1024


class SFTModel(nn.Module):
    """A causal language model of transformers, from packed rows to the loss of each part."""

    def __init__(self, causal_lm: nn.Module):
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self, input_ids, position_ids, cu_seqlens, max_seqlen, target_positions, target_ids, is_think
    ) -> torch.Tensor:
        """(2,) summed cross-entropy in nats of the think and of the answer targets, at least fp32.

        Takes a micro-batch of `data.batches.collate`. Without targets the sums are 0 and so are all
        gradients, which is what a rank short of rows needs.
        """
        hidden = self.causal_lm.model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        ).last_hidden_state[0]
        # The head runs only where there is a target, and its logits are made again in the backward.
        losses = [
            checkpoint(self.token_losses, chunk, ids, use_reentrant=False)
            for chunk, ids in zip(hidden[target_positions].split(CHUNK), target_ids.split(CHUNK), strict=True)
        ]
        losses = torch.cat(losses)
        return torch.stack([(losses * is_think).sum(), (losses * ~is_think).sum()])

    def tie_weights(self) -> None:
        """Called by accelerate, which ties the shards of FSDP2 anew."""
        self.causal_lm.tie_weights()

    def token_losses(self, hidden: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """hidden (n, hidden_size), target_ids (n,) -> (n,)"""
        logits = self.causal_lm.lm_head(hidden)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        return F.cross_entropy(logits, target_ids, reduction="none")
