"""SFTModel: the wrapped forward returns the loss of each target, never logits; and what a function makes of these."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from model.lora import updates_off

# Targets whose logits exist at one time if there is no gradient, or if a function takes them: an evaluation lays more
# rows end to end than training does, and must not need more memory.
SMALL_CHUNK = 1024
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
        self.reference: tuple[Reference, ...] = ()  # a tuple, so that it is no part of this module and its weights
        self._no_split_modules = causal_lm._no_split_modules  # what FSDP2 shards: the decoder's layer
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
        device, ctx.dtype = weight.device.type, type_of_products(weight)
        ctx.chunk, ctx.compiled, ctx.logits = chunk, compiled, None
        half_weight, losses, log_sums, is_correct = weight.to(ctx.dtype), [], [], []
        for rows, ids in zip(hidden.split(chunk), target_ids.split(chunk), strict=True):
            logits = rows.to(ctx.dtype) @ half_weight.T
            for block, block_ids in blocks(logits, ids, size=block_size(device, logits.shape[1], compiled)):
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
        half_weight, kept, ctx.logits, device = weight.to(ctx.dtype), ctx.logits, None, weight.device.type
        of_targets = (torch.expm1(-losses) * grad).to(ctx.dtype)  # (probability - 1) * grad
        grad_hidden = torch.empty_like(hidden)
        # None if the head is frozen, as under LoRA.
        grad_weight = torch.zeros_like(weight, dtype=at_least_fp32(weight)) if ctx.needs_input_grad[1] else None
        parts = (t.split(ctx.chunk) for t in (hidden, target_ids, of_targets, log_sums, grad, grad_hidden))
        for rows, ids, of_ids, sums, scales, grad_rows in zip(*parts, strict=True):
            rows = rows.to(ctx.dtype)
            logits = rows @ half_weight.T if kept is None else kept
            for block in blocks(logits, sums, scales, size=block_size(device, logits.shape[1], ctx.compiled)):
                (compiled_scaled_softmax_ if ctx.compiled else scaled_softmax_)(*block)
            # scatter_ would copy all logits to fp32 on a CPU.
            logits[torch.arange(len(ids), device=ids.device), ids] = of_ids
            add_products(logits, rows, half_weight, grad_rows, grad_weight)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


class HeadFunction(torch.autograd.Function):
    """As HeadLoss, with what a function makes of the logits: (n,) cross-entropy, and (n,) for each of its results.

    Logits are made again in the backward. The gradient through the function is autograd's, a block of targets at a
    time, so what it keeps is kept of one block.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, chunk: int, of_logits: Callable, *other):
        """other: the reference's hidden (n, hidden_size) and weight."""
        ctx.chunk, ctx.of_logits, ctx.dtype = chunk, of_logits, type_of_products(weight)
        ctx.numbers = random_states(hidden.device)
        ctx.is_shared = bool(other) and other[1] is weight  # under LoRA
        ctx.save_for_backward(hidden, weight, target_ids, *other)
        halves = heads_of(ctx, weight, *other)
        found = [
            results(of_logits, *block)
            for _, _, parts in logits_of(chunk, halves, hidden, target_ids, other[:1])
            for block in parts
        ]
        return tuple(map(torch.cat, zip(*found, strict=True)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        hidden, weight, target_ids, *other = ctx.saved_tensors
        halves = heads_of(ctx, weight, *other)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=at_least_fp32(weight)) if ctx.needs_input_grad[1] else None
        places = iter(grad_hidden.split(ctx.chunk))
        with same_numbers(ctx.numbers, hidden.device):
            for rows, logits, parts in logits_of(ctx.chunk, halves, hidden, target_ids, other[:1], *grads):
                for block, *more in parts:
                    arguments, scales = more[: len(halves)], more[len(halves) :]
                    block.copy_(gradient_of(ctx.of_logits, block, arguments, scales))
                add_products(logits, rows, halves[0], next(places), grad_weight)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * (3 + len(other))


def heads_of(ctx, weight: torch.Tensor, *other) -> list[torch.Tensor]:
    """The head, and the reference's, in the type of products."""
    half = weight.to(ctx.dtype)
    return [half, *([half] if ctx.is_shared else [one.to(ctx.dtype) for one in other[1:]])]


def logits_of(chunk: int, halves: list[torch.Tensor], hidden, target_ids, other: Sequence, *more):
    """Of each chunk: its hidden states, its logits, and its blocks of (logits, ids, the reference's logits, *more)."""
    for rows, *parts in zip(*(t.split(chunk) for t in (hidden, *other, target_ids, *more)), strict=True):
        rows = rows.to(halves[0].dtype)
        logits = rows @ halves[0].T
        theirs = [parts.pop(0).to(half.dtype) @ half.T for half in halves[1:]]
        ids, *parts = parts
        yield rows, logits, blocks(logits, ids, *theirs, *parts, size=block_size(logits.device.type, logits.shape[1]))
        del logits, theirs  # before those of the next chunk


def results(of_logits: Callable, logits, ids, *other) -> tuple[torch.Tensor, ...]:
    """(m,) cross-entropy, and what the function gives, all in at least fp32 and without autocast."""
    logits, *other = (one.to(at_least_fp32(one)) for one in (logits, *other))
    with torch.autocast(logits.device.type, enabled=False):
        own = of_logits(logits, ids, *other)
        own = own if isinstance(own, (tuple, list)) else (own,)
        for one in own:
            if not isinstance(one, torch.Tensor) or one.shape != ids.shape:
                what = list(one.shape) if isinstance(one, torch.Tensor) else type(one).__name__
                raise ValueError(f"of_logits gave {what} for {len(ids)} targets; it gives one number for each, (m,)")
        return cross_entropy(logits, ids), *own


def gradient_of(of_logits: Callable, logits, arguments: Sequence, scales: Sequence) -> torch.Tensor:
    """The gradient of the logits. scales: (m,) of each of `results`."""
    leaf = logits.to(at_least_fp32(logits)).detach().requires_grad_()
    with torch.enable_grad():
        found = results(of_logits, leaf, *arguments)
    used = [(one, scale) for one, scale in zip(found, scales, strict=True) if one.requires_grad]
    return torch.autograd.grad([one for one, _ in used], leaf, [scale for _, scale in used])[0]


def add_products(grad_logits, rows, half_weight, grad_rows, grad_weight: torch.Tensor | None) -> None:
    """Writes the gradient of a chunk's hidden states, and adds that of the head, which has none if it is frozen."""
    grad_rows.copy_(grad_logits @ half_weight)
    if grad_weight is not None:
        for part, grad_part in blocks(grad_logits.T, grad_weight, size=VOCABULARY_BLOCK):
            grad_part += part @ rows


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Of the generators from which a function of logits may draw."""
    own = [] if device.type in ("cpu", "mps") else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *own]


@contextmanager
def same_numbers(states: list[torch.Tensor], device: torch.device):
    """Within it random numbers are those that followed `random_states`."""
    on_host, *on_device = states
    with torch.random.fork_rng([device] if on_device else [], device_type=device.type if on_device else "cuda"):
        torch.set_rng_state(on_host)
        for state in on_device:
            torch.get_device_module(device).set_rng_state(state, device)
        yield


def type_of_products(weight: torch.Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


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


def block_size(device: str, vocabulary: int, compiled: bool = False) -> int:
    """Rows of logits that are worked on at one time. On a CPU their fp32 copies stay in its cache, and in memory that
    the process keeps; on a GPU they are 0.1 GB. Compiled, there is no copy, and an index must fit 32 bits."""
    elements = 2**27 if compiled else 400_000 if device == "cpu" else 2**24
    return max(1, elements // vocabulary)


def blocks(*tensors: torch.Tensor, size: int):
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def at_least_fp32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
