"""Token-exact evaluation: the training loss over every held-out row, each counted once."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from data.batches import MicroBatch
from loop.distributed import to_device


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
def evaluate(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    check: Callable[[], None] = lambda: None,
) -> EvalMetrics:
    """micro_batches: this rank's share of the rows, as many as every other rank has. check: called before each of
    them; what it raises ends the evaluation.

    Sums are added up exactly on the host and divided once, so the result depends neither on the evaluation batch
    size nor on the number of ranks. The model is left in the mode it came in.
    """
    was_training = model.training
    model.eval()
    sums = []  # of each micro-batch: (loss, correct, count) x (think, answer)
    try:
        for micro_batch in micro_batches:
            check()
            inputs, is_think = to_device(micro_batch, accelerator.device)
            losses, is_correct = model(**inputs, count_correct=True)
            measures = (losses, is_correct.to(losses.dtype), torch.ones_like(losses))
            sums.append(torch.stack([(x * part).sum() for x in measures for part in (is_think, ~is_think)]))
    finally:
        model.train(was_training)
    columns = zip(*accelerator.gather(torch.stack(sums)).tolist(), strict=True)  # all ranks
    think_loss, answer_loss, think_correct, answer_correct, think, answer = (total(column) for column in columns)
    return EvalMetrics(
        mean(think_loss + answer_loss, think + answer),
        mean(think_loss, think),
        mean(answer_loss, answer),
        mean(think_correct, think),
        mean(answer_correct, answer),
    )


def total(values: Sequence[float]) -> float:
    """The exact sum, rounded once, whatever the order."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def mean(total: float, count: float) -> float:
    return total / count if count else math.nan
