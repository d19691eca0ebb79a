"""Token-exact evaluation: the training loss over every held-out row, each counted once."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from data.batches import MicroBatch
from loop.distributed import to_device


class EvalMetrics(NamedTuple):
    """Mean cross-entropy per target token in nats, and the share of targets that are the model's likeliest next
    token after the true ones before; a part without targets has NaN. close and stop are the one target that ends a
    row's thinking and the one that ends the row: whether the model keeps the form, at no cost."""

    loss: float
    think_loss: float
    answer_loss: float
    think_accuracy: float
    answer_accuracy: float
    close_accuracy: float
    stop_accuracy: float

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    accelerator: Accelerator,
    check: Callable[[], None] = lambda: None,
    each: Callable[[int, torch.Tensor], None] = lambda index, losses: None,
) -> EvalMetrics:
    """micro_batches: this rank's share of the rows, as many as every other rank has. check: called before each of
    them; what it raises ends the evaluation. each: called with the number of a micro-batch and its losses (n,).

    Sums are added up exactly on the host and divided once, so the result depends neither on the evaluation batch
    size nor on the number of ranks. The model is left in the mode it came in.
    """
    was_training = model.training
    model.eval()
    sums = []  # of each micro-batch: (loss, correct, count) x (think, answer, close, stop)
    try:
        for index, micro_batch in enumerate(micro_batches):
            check()
            inputs, *parts = to_device([micro_batch.inputs, *parts_of(micro_batch)], accelerator.device)
            losses, is_correct = model(**inputs, count_correct=True)
            measures = (losses, is_correct.to(losses.dtype), torch.ones_like(losses))
            sums.append(torch.stack([(measure * part).sum() for measure in measures for part in parts]))
            each(index, losses)
    finally:
        model.train(was_training)
    columns = zip(*accelerator.gather(torch.stack(sums)).tolist(), strict=True)  # all ranks
    totals = [total(column) for column in columns]
    (think_loss, answer_loss, *_), correct, count = totals[:4], totals[4:8], totals[8:]
    return EvalMetrics(
        mean(think_loss + answer_loss, count[0] + count[1]),
        mean(think_loss, count[0]),
        mean(answer_loss, count[1]),
        *map(mean, correct, count),
    )


def parts_of(micro_batch: MicroBatch) -> tuple[torch.Tensor, ...]:
    """(n,) bool each, on the host: which targets are thinking, which answer, which end a row's thinking, which end a
    row. An answer always follows the thinking, because it has at least its end token."""
    is_think, inputs = micro_batch.is_think, micro_batch.inputs
    closes = is_think & ~torch.cat([is_think[1:], is_think[:1]])
    stops = torch.isin(inputs["target_positions"] + 2, inputs["cu_seqlens"][1:])
    return is_think, ~is_think, closes, stops


class LossOfGroups:
    """The evaluation loss of each set and of each group of validation rows.

    Rows are summed up one by one and the sums added exactly on the host, so that a group's loss, too, depends neither
    on the batch size nor on the number of ranks.
    """

    def __init__(self, labels: list[list[tuple[tuple[str, ...], int]]]):
        """labels: of each row of each micro-batch its labels and its number of targets; see `Data.eval_labels`."""
        self.labels = labels
        self.sums: list[torch.Tensor] = []

    def add(self, index: int, losses: torch.Tensor) -> None:
        if index == 0:  # an evaluation begins; one before may have been left
            self.sums.clear()
        if self.labels:
            of_rows = losses.split([count for _, count in self.labels[index]])
            self.sums.append(torch.stack([row.sum() for row in of_rows]))

    def means(self) -> dict[str, float]:
        """label -> mean loss of a target, over all ranks; every rank calls it."""
        if not self.labels:
            return {}
        rows = [row for rows in self.labels for row in rows]
        sums = torch.cat(self.sums).tolist()
        found = [(labels, count, loss) for (labels, count), loss in zip(rows, sums, strict=True)]
        groups: dict[str, list[tuple[int, float]]] = {}
        for labels, count, loss in gather_object(found):
            for label in labels:
                groups.setdefault(label, []).append((count, loss))
        return {
            label: mean(total([loss for _, loss in rows]), sum(count for count, _ in rows))
            for label, rows in sorted(groups.items())
        }


def total(values: Sequence[float]) -> float:
    """The exact sum, rounded once, whatever the order."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def mean(total: float, count: float) -> float:
    return total / count if count else math.nan
