"""SFTModel: the wrapped forward returns the loss of each target, never logits."""

import torch
from torch import nn

# Targets whose logits exist at one time if there is no gradient: an evaluation lays more rows end to end than
# training does, and must not need more memory.
EVAL_CHUNK = 1024
# Tokens of the vocabulary whose part of the head's gradient is made at one time, before it is added up in fp32.
VOCABULARY_BLOCK = 16384


class SFTModel(nn.Module):
    """A causal language model of transformers, from packed rows to the loss of each target."""

    def __init__(self, causal_lm: nn.Module, loss_chunk: int, compiled: bool = False):
        """loss_chunk: targets whose logits exist at one time. Fewer targets than that are one chunk, and its
        logits stay for the backward, in half precision under autocast; of several chunks they are made again.
        compiled: the softmax over the vocabulary, too."""
        super().__init__()
        self.causal_lm = causal_lm
        self._no_split_modules = causal_lm._no_split_modules  # what FSDP2 shards: the decoder's layer
        self.loss_chunk, self.compiled = loss_chunk, compiled

    def forward(
        self, input_ids, position_ids, cu_seqlens, max_seqlen, target_positions, target_ids, count_correct: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(n,) cross-entropy in nats of each target, at least fp32; with count_correct also (n,) bool, whether the
        target is the likeliest token. Takes the inputs of a `data.batches.MicroBatch`.

        Without targets (n = 0) every parameter still gets a gradient, of 0, which a rank short of rows needs.
        """
        hidden = self.causal_lm.model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        ).last_hidden_state[0]
        # The head runs only on positions with a target.
        losses, is_correct = HeadLoss.apply(
            hidden[target_positions],
            self.causal_lm.lm_head.weight,
            target_ids,
            self.loss_chunk if torch.is_grad_enabled() else min(self.loss_chunk, EVAL_CHUNK),
            self.compiled,
            torch.is_grad_enabled(),
            count_correct,
        )
        return (losses, is_correct) if count_correct else losses

    def generate(self, **inputs) -> torch.Tensor:
        """`generate` of the model inside, here because FSDP2 gathers the weights that lie outside its layers."""
        return self.causal_lm.generate(**inputs)

    def tie_weights(self) -> None:
        """Called by accelerate, which ties the shards of FSDP2 again."""
        self.causal_lm.tie_weights()


class HeadLoss(torch.autograd.Function):
    """Cross-entropy in nats of a linear head: hidden (n, hidden_size), weight (vocabulary, hidden_size), ids (n,)
    -> (n,), and (n,) whether each target is the likeliest token, if that is asked for.

    Targets go in chunks. The gradient, softmax(logits) - onehot(ids), is written over a chunk's logits, so a backward
    holds them once; autograd would hold them four times, three of these in fp32. Matrix products are in autocast's
    type, the softmax at least in fp32. (F.linear_cross_entropy of torch 2.13 ignores autocast: 16.2 s against 6.1 s
    for 600 targets and 151,936 logits on one thread.)
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, chunk: int, compiled: bool, with_grad: bool, count_correct: bool):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.chunk, ctx.compiled, ctx.logits = chunk, compiled, None
        half_weight, losses, log_sums, is_correct = weight.to(ctx.dtype), [], [], []
        for rows, ids in zip(hidden.split(chunk), target_ids.split(chunk), strict=True):
            logits = rows.to(ctx.dtype) @ half_weight.T
            for block, block_ids in blocks(logits, ids, size=block_size(logits, compiled)):
                losses.append((compiled_cross_entropy if compiled else cross_entropy)(block, block_ids))
                log_sums.append(losses[-1] + block.gather(1, block_ids[:, None])[:, 0])
                if count_correct:
                    is_correct.append(block.argmax(-1) == block_ids)
        if with_grad and len(target_ids) <= chunk:
            ctx.logits = logits
        losses = torch.cat(losses)
        ctx.save_for_backward(hidden, weight, target_ids, losses, torch.cat(log_sums))
        is_correct = torch.cat(is_correct) if count_correct else losses.new_empty(0, dtype=torch.bool)
        ctx.mark_non_differentiable(is_correct)
        return losses, is_correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, target_ids, losses, log_sums = ctx.saved_tensors
        half_weight, kept, ctx.logits = weight.to(ctx.dtype), ctx.logits, None
        of_targets = (torch.expm1(-losses) * grad).to(ctx.dtype)  # (probability - 1) * grad
        grad_hidden = torch.empty_like(hidden)
        # None if the head is frozen, as under LoRA.
        grad_weight = torch.zeros_like(weight, dtype=at_least_fp32(weight)) if ctx.needs_input_grad[1] else None
        parts = (t.split(ctx.chunk) for t in (hidden, target_ids, of_targets, log_sums, grad, grad_hidden))
        for rows, ids, of_ids, sums, scales, grad_rows in zip(*parts, strict=True):
            rows = rows.to(ctx.dtype)
            logits = rows @ half_weight.T if kept is None else kept
            for block in blocks(logits, sums, scales, size=block_size(logits, ctx.compiled)):
                (compiled_scaled_softmax_ if ctx.compiled else scaled_softmax_)(*block)
            # scatter_ would copy all logits to fp32 on a CPU.
            logits[torch.arange(len(ids), device=ids.device), ids] = of_ids
            grad_rows.copy_(logits @ half_weight)
            if grad_weight is not None:
                for part, grad_part in blocks(logits.T, grad_weight, size=VOCABULARY_BLOCK):
                    grad_part += part @ rows
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return -logits.log_softmax(-1, dtype=at_least_fp32(logits)).gather(1, ids[:, None])[:, 0]


def scaled_softmax_(logits: torch.Tensor, log_sums: torch.Tensor, scales: torch.Tensor) -> None:
    """Writes softmax(logits) over the logits, each row times its scale. log_sums (n,): of each row, log of the sum of
    exp, at least fp32."""
    logits.copy_((logits - log_sums[:, None]).exp_().mul_(scales[:, None]))


# One kernel each: 6 bytes of traffic a logit, where the kernels of the plain functions make some 40.
compiled_cross_entropy = torch.compile(cross_entropy, dynamic=True)
compiled_scaled_softmax_ = torch.compile(scaled_softmax_, dynamic=True)


def compiles() -> bool:
    """Whether the compiler works on this CPU; if so, it has compiled both functions for logits in bf16."""
    logits, ids = torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.long)
    try:
        with torch.no_grad():
            compiled_scaled_softmax_(logits, compiled_cross_entropy(logits, ids), torch.ones(3))
    except Exception:  # no headers, no OpenMP: each in its own way
        return False
    return True


def block_size(logits: torch.Tensor, compiled: bool) -> int:
    """Rows of logits that are worked on at one time. On a CPU their fp32 copies stay in its cache, and in memory that
    the process keeps; on a GPU they are 0.1 GB. Compiled, there is no copy, and an index must fit 32 bits."""
    elements = 2**27 if compiled else 400_000 if logits.device.type == "cpu" else 2**24
    return max(1, elements // logits.shape[1])


def blocks(*tensors: torch.Tensor, size: int):
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def at_least_fp32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
