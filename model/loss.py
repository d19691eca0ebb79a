"""SFTModel: the wrapped forward returns the loss of each target, never logits; and what a function makes of these."""

from collections.abc import Callable

import torch
from torch import nn

from model.head import SMALL_CHUNK, HeadFunction, HeadLoss
from model.lora import updates_off


class SFTModel(nn.Module):
    """A causal language model of transformers, from packed rows to the loss of each target."""

    def __init__(self, causal_lm: nn.Module, loss_chunk: int, compiled: bool = False):
        """loss_chunk: targets whose logits exist at one time. Fewer targets than that are one chunk, and its
        logits stay for the backward, in half precision under autocast; of several chunks they are made again.
        compiled: the softmax over the vocabulary, too."""
        super().__init__()
        self.causal_lm = causal_lm
        self.reference: tuple[Reference, ...] = ()  # a tuple, so that it is no part of this module and its weights
        self._no_split_modules = [type(causal_lm.model.layers[0]).__name__]  # what FSDP2 shards
        self.loss_chunk, self.compiled = loss_chunk, compiled

    def forward(
        self, input_ids, position_ids, cu_seqlens, max_seqlen, target_positions, target_ids,
        count_correct: bool = False, of_logits: Callable | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:  # fmt: skip
        """(n,) cross-entropy in nats of each target, at least fp32. Takes the inputs of a `data.batches.MicroBatch`.

        count_correct: also (n,) bool, whether the target is the likeliest token. of_logits: also what this function
        makes of logits (m, vocabulary), at least fp32, and targets (m,): one (m,) tensor or several, which come back
        as (n,) tensors with their gradient. It gets a block of targets at a time, and again in the backward, with the
        same random numbers; if there is a reference, also the reference's logits, which have no gradient. Raises
        ValueError if it returns another shape.

        Without targets (n = 0) every parameter still gets a gradient, of 0, which a rank short of rows needs.
        """
        rows = {"position_ids": position_ids, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        other = ()
        if of_logits and self.reference:
            weight = self.causal_lm.lm_head.weight
            other = self.reference[0](input_ids, target_positions, rows, weight.dtype)
            other = other[:1] if other[1] is weight else other  # under LoRA there is one head
        hidden = self.causal_lm.model(input_ids=input_ids, use_cache=False, **rows).last_hidden_state[0]
        # The head runs only on positions with a target.
        head = hidden[target_positions], self.causal_lm.lm_head.weight, target_ids
        with_grad, small = torch.is_grad_enabled(), min(self.loss_chunk, SMALL_CHUNK)
        if of_logits:
            return HeadFunction.apply(*head, small, of_logits, *other)
        losses, is_correct = HeadLoss.apply(
            *head, self.loss_chunk if with_grad else small, self.compiled, with_grad, count_correct
        )
        return (losses, is_correct) if count_correct else losses

    def generate(self, **inputs) -> torch.Tensor:
        """`generate` of the model inside, here because FSDP2 gathers the weights that lie outside its layers."""
        return self.causal_lm.generate(**inputs)

    def tie_weights(self) -> None:
        """Called by accelerate, which ties the shards of FSDP2 again."""
        self.causal_lm.tie_weights()


class Reference(nn.Module):
    """A causal language model without gradients; of one with LoRA's updates, the model without them."""

    def __init__(self, causal_lm: nn.Module):
        super().__init__()
        self.causal_lm = causal_lm

    @torch.no_grad()
    def forward(self, input_ids, target_positions, rows: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (n, hidden_size) and head (vocabulary, hidden_size), whose products are the logits. dtype: of
        the sums of layers, as it is in the model that is trained."""
        causal_lm, was_training = self.causal_lm, self.causal_lm.training
        with updates_off(causal_lm.eval()):
            embedded = causal_lm.model.embed_tokens(input_ids).to(dtype)
            hidden = causal_lm.model(inputs_embeds=embedded, use_cache=False, **rows).last_hidden_state[0]
        causal_lm.train(was_training)
        return hidden[target_positions], causal_lm.lm_head.weight
