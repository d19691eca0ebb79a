"""One optimizer step. This is the file to edit."""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator


class StepMetrics(NamedTuple):
    """What one step did, over the global batch; losses are summed cross-entropy in nats."""

    think_loss_sum: float
    answer_loss_sum: float
    num_think_tokens: int
    num_answer_tokens: int
    grad_norm: float  # before clipping

    @property
    def finite(self) -> bool:
        return math.isfinite(self.grad_norm)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict],
    accelerator: Accelerator,
    lr: float,
    max_grad_norm: float,
) -> StepMetrics:
    """Back-propagates this rank's micro-batches of the global batch and updates the weights once.

    The loss is the mean over every target token of the global batch, so neither the cut into
    micro-batches nor the number of ranks changes the gradient. Every rank must bring the same
    number of micro-batches. Where the gradient norm is not finite nothing is updated.
    """
    # --- loss: the mean over every target token of the global batch -----------------------------
    is_think = torch.cat([micro_batch["is_think"] for micro_batch in micro_batches])
    num_targets = accelerator.reduce(torch.stack([is_think.sum(), (~is_think).sum()]))  # all ranks
    loss_sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    for index, micro_batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            part_sums = model(**micro_batch)  # (2,): summed cross-entropy of think, of answer
            # DDP and FSDP average gradients over ranks; the world size undoes that.
            accelerator.backward(part_sums.sum() * (accelerator.num_processes / num_targets.sum().double()))
        loss_sums += part_sums.detach()
    loss_sums = accelerator.reduce(loss_sums)  # all ranks

    # --- update: edit here ----------------------------------------------------------------------
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)  # all ranks
    metrics = StepMetrics(*loss_sums.tolist(), *num_targets.tolist(), float(grad_norm))  # the one wait for the device
    if metrics.finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics
