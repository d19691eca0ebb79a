"""Layer-wise learning rates: each layer 0.9 times the rate of the one above it, the embeddings lowest.

Paper: ULMFiT's discriminative fine-tuning (Howard and Ruder, arXiv:1801.06146); BERT-style decay (arXiv:2006.05987).
Cost: no memory, no time. Changed: make_optimizers. A tied head has the rate of the embeddings.
"""

import math
from contextlib import contextmanager, nullcontext

import torch

from loop.state import StepMetrics
from model.adamw_8bit import adamw_8bit

DECAY = 0.9  # from one layer to the one below it


def make_optimizers(model, config) -> list[torch.optim.Optimizer]:
    """A group for each depth and decay; the `lr` of a group is that group's peak."""
    num_layers = model.causal_lm.config.num_hidden_layers
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        _, _, inner = name.partition("model.layers.")
        depth = int(inner.split(".")[0]) + 1 if inner else 0 if "embed_tokens" in name else num_layers + 1
        group = groups.setdefault((depth, parameter.ndim >= 2), {"params": []})
        group["params"].append(parameter)
        group["name"] = f"depth {depth}"
        group["lr"] = config.learning_rate * DECAY ** (num_layers + 1 - depth)
        group["weight_decay"] = config.weight_decay if parameter.ndim >= 2 else 0.0
    if config.memory in ("24g", "16g"):
        return [adamw_8bit(list(groups.values()), lr=config.learning_rate)]
    return [torch.optim.AdamW(groups.values(), lr=config.learning_rate, fused=True)]


def lr_multiplier(step, max_steps, config) -> float:
    """Share of each group's peak in the update after `step` steps; the values of transformers' `get_scheduler`."""
    warmup_steps = math.ceil(max_steps * config.warmup_ratio)
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return {"linear": 1.0 - progress, "cosine": cosine, "constant": 1.0}[config.lr_scheduler_type]


def forward_backward(model, batch, accelerator, config) -> torch.Tensor:
    """Adds the gradient of the loss, a mean over every target of the global batch, to `.grad`.

    So neither the packing of rows nor the number of ranks changes the gradient. Returns (micro-batches, 2): this
    rank's summed cross-entropy in nats of the think and of the answer targets, not weighted.
    """
    loss_sums = []
    for number, (inputs, is_think) in enumerate(batch.micro_batches, start=1):
        with nullcontext() if number == len(batch.micro_batches) else accelerator.no_sync(model):
            losses = model(**inputs)  # (n,) cross-entropy of each target
            weights = is_think * config.think_weight + ~is_think * config.answer_weight
            loss = (losses * weights).sum() / batch.num_targets
            # DDP and FSDP2 average gradients over ranks; the number of ranks undoes that.
            accelerator.backward(loss * accelerator.num_processes)
        loss_sums.append(torch.stack([(losses * is_think).sum(), (losses * ~is_think).sum()]).detach())
    return torch.stack(loss_sums)


def train_step(model, optimizers, batch, accelerator, multiplier, config) -> StepMetrics:
    """One update of the weights, at `multiplier` of each group's peak rate; none if the gradient is not finite."""
    loss_sums = forward_backward(model, batch, accelerator, config)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])  # all ranks
    metrics = StepMetrics.of(batch, accelerator.gather(loss_sums), norm)  # the one wait for the device
    if 0 < config.max_grad_norm < metrics.grad_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.max_grad_norm, norm)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
        if metrics.finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return metrics


@contextmanager
def evaluated_weights(model, optimizers):
    """Within it the model has the weights that are evaluated, answer the samples and are exported: its own."""
    yield
