"""The method: optimizers, learning rate, loss, one step. Edit this file, or train with one that has the functions it
changes: --step-file PATH. docs/method.md says what else a step file can have.

Random numbers differ from rank to rank. Draw those that must be equal on all ranks, and the same after a resume, from
torch.Generator(device).manual_seed(batch.seed). State of a parameter, such as an average, belongs in
optimizer.state[parameter], set after optimizer.step(); checkpoints hold it.
"""

import math
from contextlib import contextmanager, nullcontext

import torch

from loop.state import StepMetrics
from model.adamw_8bit import adamw_8bit


def make_optimizers(model, config) -> list[torch.optim.Optimizer]:
    """Every trained parameter is in exactly one group; the `lr` of a group is that group's peak."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},  # norms; none under LoRA
    ]
    groups = [group for group in groups if group["params"]]
    if config.optim == "adamw_8bit":
        return [adamw_8bit(groups, lr=config.learning_rate)]
    return [torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)]


def lr_multiplier(step, max_steps, config) -> float:
    """Share of each group's peak in the update after `step` steps; the values of transformers' `get_scheduler`."""
    warmup_steps = math.ceil(max_steps * config.warmup_ratio)
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return {"linear": 1.0 - progress, "cosine": cosine, "constant": 1.0}[config.lr_scheduler_type]


def part_weights(micro_batch, config) -> torch.Tensor:  # (n,): of each target, that of thinking or answer
    return micro_batch.is_think * config.think_weight + ~micro_batch.is_think * config.answer_weight


def micro_batch_loss(model, micro_batch, batch, config) -> tuple[torch.Tensor, torch.Tensor]:
    """(what it adds to the loss, the (n,) cross-entropy of its targets in nats, which is reported). The loss is a mean
    over every target of the global batch, so neither the packing of rows nor the number of ranks changes it."""
    losses = model(**micro_batch.inputs)
    return (losses * part_weights(micro_batch, config)).sum() / batch.num_targets, losses


def forward_backward(model, batch, accelerator, config) -> torch.Tensor:
    """Adds the gradient of the loss to `.grad`. Returns (micro-batches, 2): this rank's summed cross-entropy of the
    think and of the answer targets, not weighted."""
    loss_sums = []
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        with nullcontext() if number == len(batch.micro_batches) else accelerator.no_sync(model):
            loss, losses = micro_batch_loss(model, micro_batch, batch, config)
            # DDP and FSDP2 average gradients over ranks; the number of ranks undoes that.
            accelerator.backward(loss * accelerator.num_processes)
        is_think = micro_batch.is_think
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
