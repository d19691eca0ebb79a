"""The linear head over the vocabulary, and the loss: of all logits no more than a chunk is there at one time."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch

# Targets whose logits exist at one time if there is no gradient, or if a function takes them: an evaluation lays more
# rows end to end than training does, and must not need more memory.
SMALL_CHUNK = 1024
# Tokens of the vocabulary whose part of the head's gradient is made at one time, before it is added up in fp32.
VOCABULARY_BLOCK = 16384


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
        """other: the reference's hidden (n, hidden_size), and its weight if that is not the same."""
        ctx.chunk, ctx.of_logits, ctx.dtype = chunk, of_logits, type_of_products(weight)
        ctx.numbers = random_states(hidden.device)
        ctx.save_for_backward(hidden, weight, target_ids, *other)
        halves = [one.to(ctx.dtype) for one in (weight, *other[1:])]
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
        halves = [one.to(ctx.dtype) for one in (weight, *other[1:])]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=at_least_fp32(weight)) if ctx.needs_input_grad[1] else None
        places = iter(grad_hidden.split(ctx.chunk))
        with same_numbers(ctx.numbers, hidden.device):
            for rows, logits, parts in logits_of(ctx.chunk, halves, hidden, target_ids, other[:1], *grads):
                for block, *more in parts:
                    arguments, scales = more[: -len(grads)], more[-len(grads) :]
                    block.copy_(gradient_of(ctx.of_logits, block, arguments, scales))
                add_products(logits, rows, halves[0], next(places), grad_weight)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * (3 + len(other))


def logits_of(chunk: int, halves: list[torch.Tensor], hidden, target_ids, other: Sequence, *more):
    """Of each chunk: its hidden states, its logits, and its blocks of (logits, ids, the reference's logits, *more)."""
    for rows, *parts in zip(*(t.split(chunk) for t in (hidden, *other, target_ids, *more)), strict=True):
        rows = rows.to(halves[0].dtype)
        logits = rows @ halves[0].T
        theirs = [parts.pop(0).to(rows.dtype) @ halves[-1].T for _ in other]
        ids, *parts = parts
        yield rows, logits, blocks(logits, ids, *theirs, *parts, size=block_size(logits.device.type, logits.shape[1]))
        del logits, theirs  # before those of the next chunk


def results(of_logits: Callable, logits, ids, *other) -> tuple[torch.Tensor, ...]:
    """(m,) cross-entropy, and what the function gives, all in at least fp32 and without autocast."""
    logits, *other = (one.to(at_least_fp32(one)) for one in (logits, *other))
    with torch.autocast(logits.device.type, enabled=False):
        losses = cross_entropy(logits, ids)  # first: the function may write to the logits
        own = of_logits(logits, ids, *other)
        own = own if isinstance(own, (tuple, list)) else (own,)
        for one in own:
            if not isinstance(one, torch.Tensor) or one.shape != ids.shape:
                what = list(one.shape) if isinstance(one, torch.Tensor) else type(one).__name__
                raise ValueError(f"of_logits gave {what} for {len(ids)} targets; it gives one number for each, (m,)")
        return losses, *own


def gradient_of(of_logits: Callable, logits, arguments: Sequence, scales: Sequence) -> torch.Tensor:
    """The gradient of the logits. scales: (m,) of each of `results`."""
    leaf = logits.to(at_least_fp32(logits)).detach().requires_grad_()
    with torch.enable_grad():
        found = results(of_logits, leaf, *arguments)
    used = [(one, scale) for one, scale in zip(found, scales, strict=True) if one.grad_fn is not None]
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
