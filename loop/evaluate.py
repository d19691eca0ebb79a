"""Token-exact evaluation: the training loss over every held-out row, each counted once."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from loop.processes import to_device


class EvalMetrics(NamedTuple):
    """Mean cross-entropy per target token in nats, and the share of targets that are the model's likeliest next
    token after the true ones before; a part without targets has NaN."""

    loss: float
    think_loss: float
    answer_loss: float
    think_accuracy: float
    answer_accuracy: float

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


@torch.no_grad()
def evaluate(model: torch.nn.Module, micro_batches: Sequence[dict], accelerator: Accelerator) -> EvalMetrics:
    """micro_batches: this rank's share of the rows, as many as every other rank has.

    Sums are kept in fp64 and divided once, so the result depends neither on the evaluation batch size
    nor on the number of ranks. The model is left in the mode it came in.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, 2, dtype=torch.float64, device=accelerator.device)  # (loss, correct, count) x (think, answer)
    for micro_batch in micro_batches:
        micro_batch = to_device(micro_batch, accelerator.device)
        is_think = micro_batch["is_think"]
        sums[:2] += model(**micro_batch, count_correct=True)
        sums[2] += torch.stack([is_think.sum(), (~is_think).sum()])
    model.train(was_training)
    losses, correct, counts = accelerator.reduce(sums).tolist()  # all ranks
    return EvalMetrics(mean(sum(losses), sum(counts)), *map(mean, losses, counts), *map(mean, correct, counts))


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def mean(total: float, count: float) -> float:
    return total / count if count else math.nan
