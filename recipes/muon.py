"""Muon for the matrices of the layers; AdamW for embeddings, head and norms, each with its own peak rate.

Source: Jordan et al., https://kellerjordan.github.io/posts/muon/; the scaling that lets it use AdamW's rate and decay
is that of arXiv:2502.16982. torch.optim.Muon.
Cost: 4 bytes less a matrix element than AdamW (one moment); five products of matrices more in each update, of which
FSDP2 gathers what it needs. Changed: make_optimizers. The 8-bit moments of --memory 24g and 16g are not used.
"""

import math
from contextlib import contextmanager, nullcontext

import torch

from loop.state import StepMetrics

MUON_LR = 1.0  # peak of Muon, times learning_rate


def make_optimizers(model, config) -> list[torch.optim.Optimizer]:
    """Every trained parameter is in exactly one group; the `lr` of a group is that group's peak."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and "model.layers." in name]
    tables = [p for name, p in trained.items() if p.ndim == 2 and "model.layers." not in name]
    groups = [
        {"params": tables, "weight_decay": config.weight_decay},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # none under LoRA, which trains matrices of layers alone
    muon = torch.optim.Muon(
        [{"name": "muon", "params": matrices}],
        lr=MUON_LR * config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [*([torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)] if groups else []), muon]


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
