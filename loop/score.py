"""Rows in, a table of losses out: what every measure of a run and of the tools is made of."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator

from data.batches import collate, rank_rows
from data.encode import Example
from loop.distributed import gather, to_device

TOKENS = 8192  # laid end to end in one forward


class Scored(NamedTuple):
    """One part of one row: think, answer, close (the target that ends the thinking), stop (the one that ends the row),
    or a part that the row names itself. close lies within think, and stop within answer."""

    row: str  # its location
    part: str
    loss_sum: float  # cross-entropy in nats
    count: int  # targets
    correct: int  # targets that are the likeliest token after the true ones before


@torch.no_grad()
def score(
    model: torch.nn.Module,
    rows: Sequence[Example],
    accelerator: Accelerator,
    check: Callable[[], None] = lambda: None,
    batch_size: int = -1,
) -> list[Scored]:
    """A line for each part of each row, in their order, on every rank. All ranks call it with the same rows.

    Rows over the same tensor of tokens are computed once. Losses are added up exactly on the host, row by row, so the
    table depends neither on the batches nor on the number of ranks. check: called before each forward; what it raises
    ends all of it. batch_size: rows laid end to end; -1: as many as have TOKENS tokens. The model is left in the mode
    it came in.
    """
    rows, asked = list(rows), {}  # key -> numbers of rows; a row that is made when it is asked for stays the same
    for number, row in enumerate(rows):
        asked.setdefault(key_of(row), []).append(number)
    packing = {"batch_size": batch_size} if batch_size > 0 else {"batch_size": 1, "micro_batch_tokens": TOKENS}
    once = [rows[numbers[0]] for numbers in asked.values()]
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    found: list[tuple[int, list[Scored]]] = []

    def read(group: list[Example], losses: torch.Tensor, is_correct: torch.Tensor) -> None:
        losses, is_correct, start = losses.tolist(), is_correct.tolist(), 0
        for row in group:
            own = slice(start, start := start + row.num_targets)
            for number in asked.get(key_of(row), ()):
                found.append((number, lines_of(rows[number], losses[own], is_correct[own])))

    was_training = model.training
    model.eval()
    waiting = deque()  # a copy to the host waits for the device, which has the next forward to do meanwhile
    try:
        for group in rank_rows(once, **packing, **ranks) if rows else ():
            check()
            waiting.append((group, *model(**to_device(collate(group).inputs, accelerator.device), count_correct=True)))
            if len(waiting) > 1:
                read(*waiting.popleft())
        for last in waiting:
            read(*last)
    finally:
        model.train(was_training)
    table = sorted((pair for part in gather(found) for pair in part), key=lambda pair: pair[0])
    return [line for _, lines in table for line in lines]


def key_of(row: Example) -> tuple:
    return id(row.input_ids), row.prompt_length, row.next_tokens


def lines_of(row: Example, losses: list[float], is_correct: list[bool]) -> list[Scored]:
    return [
        Scored(row.location, part, total(losses[begin:end]), end - begin, sum(is_correct[begin:end]))
        for part, begin, end in row.parts
    ]


def loss_of(table: Iterable[Scored], *parts: str) -> float:
    """Mean cross-entropy of a target in nats, over these parts of all rows (think and answer); NaN without a target."""
    lines = [line for line in table if line.part in (parts or ("think", "answer"))]
    return mean(total([line.loss_sum for line in lines]), sum(line.count for line in lines))


def accuracy_of(table: Iterable[Scored], part: str) -> float:
    """The share of a part's targets that are the likeliest token."""
    lines = [line for line in table if line.part == part]
    return mean(sum(line.correct for line in lines), sum(line.count for line in lines))


def total(values: Sequence[float]) -> float:
    """The exact sum, rounded once, whatever the order."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
