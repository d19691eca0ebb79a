"""Step -> micro-batches: the order of rows, a rank's share of them, and their collation.

Everything here is a pure function of (seed, step), so a resumed run needs no sampler state.
"""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from data.encode import Example


class MicroBatch(NamedTuple):
    """Rows laid end to end without padding: T positions of N rows, n of them with a target.

    inputs are the keywords of the model's forward: input_ids and position_ids (1, T) int64; cu_seqlens (N + 1)
    int32, where each row begins, and T; max_seqlen, the longest row; target_positions (n,), the position whose
    hidden state predicts a target; target_ids (n,), the target.

    A row is never cut over micro-batches or ranks, so what is summed by row is the whole row's.
    """

    inputs: dict
    is_think: torch.Tensor  # (n,) bool, whether a target belongs to the thinking
    row: torch.Tensor  # (n,) int64, the place in `rows` of the row of a target
    rows: list[str]  # where the N rows stand; none in a micro-batch without targets
    num_targets: list[int]  # of each row
    reference: torch.Tensor | None = None  # (n,) fp32, the loss of a target before training, if the method asks for it
    labels: torch.Tensor | None = None  # (N,) int64, of Example: which replies are good
    units: torch.Tensor | None = None  # (N,) int64, which pair or reply of the global batch a row belongs to

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """(n,) -> (N,): the sums of each row, in the same order on any device."""
        parts = [part.sum() for part in values.split(self.num_targets)]
        return torch.stack(parts) if parts else values  # with its gradient, which a rank without targets needs too


class Batch(NamedTuple):
    """One rank's part of the global batch of one step, and what is known of the whole of it."""

    micro_batches: list[MicroBatch]
    num_think_targets: int  # of the global batch
    num_answer_targets: int
    num_tokens: int  # all positions of the global batch, prompts too
    epoch: float  # passes over the rows completed after this step
    rows: list[str]  # where the rows of the global batch stand
    step: int  # completed before this one
    seed: int  # of (seed, step), the same on every rank
    logged: list[tuple[str, torch.Tensor, int]]  # name, sum and number of values
    num_units: int  # pairs or replies that are compared, of the global batch; rows if none are
    without_gradient: list[MicroBatch]  # replies with the label 0, which are measured alone

    def log(self, name: str, values: torch.Tensor | float) -> None:
        """Records values of this step, a number or a tensor of any shape, as the figure method/NAME: the mean over all
        that are given from one row of metrics.jsonl to the next, on all ranks. Of the values of targets or rows that
        is the mean over targets or rows, however they are packed."""
        values = torch.as_tensor(values).detach().float()
        self.logged.append((name, values.sum(), values.numel()))

    @property
    def num_rows(self) -> int:
        """Of the global batch."""
        return len(self.rows)

    @property
    def num_targets(self) -> int:
        return self.num_think_targets + self.num_answer_targets


def seed_of(*parts) -> int:
    return random.Random("/".join(map(str, parts))).getrandbits(32)


def steps_per_epoch(num_examples: int, rows_per_step: int) -> int:
    """Optimizer steps in one pass; the last one of an epoch may be short."""
    return math.ceil(num_examples / rows_per_step)


def step_indices(step: int, *, num_examples: int, rows_per_step: int, seed: int) -> list[int]:
    """Indices of the global batch of the update that follows `step` completed steps."""
    epoch, position = divmod(step, steps_per_epoch(num_examples, rows_per_step))
    return epoch_order(num_examples, seed, epoch)[position * rows_per_step : (position + 1) * rows_per_step]


@functools.lru_cache(maxsize=1)  # shuffling a million rows takes 1.6 s
def epoch_order(num_examples: int, seed: int, epoch: int) -> list[int]:
    order = list(range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def step_batch(step: int, examples: Sequence[Example], *, rows_per_step: int, seed: int, **packing) -> Batch:
    """What a rank trains on after `step` completed steps; packing: the keywords of `rank_rows`."""
    units = getattr(examples, "units", ())  # of data.encoded.Encoded, if replies are compared
    num_units = len(units) or len(examples)
    indices = step_indices(step, num_examples=num_units, rows_per_step=rows_per_step, seed=seed)
    epoch = (step + 1) / steps_per_epoch(num_units, rows_per_step)
    if units:
        places = ((number, place) for number, index in enumerate(indices) for place in units[index])
        rows = [dataclasses.replace(examples[place], unit=number) for number, place in places]
    else:
        rows = [examples[index] for index in indices]
    return make_batch(rows, len(indices), epoch=epoch, step=step, seed=seed_of(seed, step), **packing)


def make_batch(
    rows: Sequence[Example], num_units: int = 0, *, epoch: float = 0.0, step: int = 0, seed: int = 0, **packing
) -> Batch:
    """Of replies that are compared the good ones are the targets, whose loss is reported."""
    good, measured = [row for row in rows if row.label > 0], [row for row in rows if not row.label]
    return Batch(
        micro_batches=rank_batches([row for row in rows if row.label], **packing),
        num_think_targets=sum(row.num_think_targets for row in good),
        num_answer_targets=sum(row.num_answer_targets for row in good),
        num_tokens=sum(map(len, rows)),
        epoch=epoch,
        rows=[row.location for row in rows],
        step=step,
        seed=seed,
        logged=[],
        num_units=num_units or len(rows),
        without_gradient=rank_batches(measured, **packing) if measured else [],
    )


def rank_batches(rows: Sequence[Example], **packing) -> list[MicroBatch]:
    """One rank's share of the rows as micro-batches; packing: the keywords of `rank_rows`."""
    return [collate(group) for group in rank_rows(rows, **packing)]


def rank_rows(
    rows: Sequence[Example], *, batch_size: int, micro_batch_tokens: int = 0, rank: int = 0, world_size: int = 1
) -> list[list[Example]]:
    """The rows of each of one rank's micro-batches, put together by `pack`.

    Every rank gets the same number of micro-batches, because each forward and backward may be a
    collective; a rank short of rows ends with micro-batches that have no target and sum to 0.
    """
    rows = list(rows)
    packed = [pack(share, batch_size, micro_batch_tokens) for share in share_out(rows, world_size)]
    none = None if rows[0].reference is None else rows[0].reference[:0]
    without_targets = [Example(rows[0].input_ids[:2], 2, 2, rows[0].location, reference=none)]
    return packed[rank] + [without_targets] * (max(map(len, packed)) - len(packed[rank]))


def share_out(rows: Sequence[Example], num_shares: int) -> list[list[Example]]:
    """Rows shared out so that tokens are near equal and no share has more than its part of the rows.

    The longest row first, each to the share with the fewest tokens; within a share rows keep their order.
    """
    shares = [[] for _ in range(num_shares)]
    tokens = [0] * num_shares
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
        free = [share for share in range(num_shares) if len(shares[share]) < math.ceil(len(rows) / num_shares)]
        share = min(free, key=tokens.__getitem__)
        shares[share].append(index)
        tokens[share] += len(rows[index])
    return [[rows[index] for index in sorted(share)] for share in shares]


def pack(rows: Sequence[Example], batch_size: int, micro_batch_tokens: int) -> list[list[Example]]:
    """Rows in groups of batch_size; if micro_batch_tokens is above 0, in as few groups of at most that many
    tokens as first fit finds, the longest row first. A row that is longer is a group of its own."""
    if not micro_batch_tokens:
        return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    size = 1 << max(0, len(rows) - 1).bit_length()
    # A tree of the room in each group, whose inner nodes hold the most below them: first fit in log2(n).
    room = [micro_batch_tokens] * (2 * size)
    groups: list[list[Example]] = []
    for row in sorted(rows, key=len, reverse=True):
        node, length = 1, len(row)
        if room[1] >= length:
            while node < size:
                node = 2 * node + (room[2 * node] < length)
        else:
            node = size + len(groups)
        if node - size == len(groups):
            groups.append([])
        groups[node - size].append(row)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return groups


def collate(rows: Sequence[Example]) -> MicroBatch:
    lengths, trained = [len(row) for row in rows], [row for row in rows if row.num_targets]
    offsets = [0, *itertools.accumulate(lengths)]
    input_ids = torch.cat([row.input_ids for row in rows]).long()
    positions, target_ids = [], []
    for start, row in zip(offsets, rows, strict=False):
        last = [start + len(row) - 1] * len(row.next_tokens)
        positions += [torch.arange(start + row.prompt_length, start + len(row)) - 1, torch.tensor(last).long()]
        target_ids += [row.input_ids[row.prompt_length :], torch.tensor(row.next_tokens).long()]
    inputs = {
        "input_ids": input_ids.unsqueeze(0),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "cu_seqlens": torch.tensor(offsets, dtype=torch.int32),
        "max_seqlen": max(lengths),
        "target_positions": torch.cat(positions),
        "target_ids": torch.cat(target_ids).long(),
    }
    references = [row.reference for row in rows if row.reference is not None]
    return MicroBatch(
        inputs,
        is_think=torch.cat([torch.arange(row.num_targets) < row.num_think_targets for row in rows]),
        row=torch.cat([torch.full((row.num_targets,), number) for number, row in enumerate(rows)]),
        rows=[row.location for row in trained],
        num_targets=[row.num_targets for row in trained],
        reference=torch.cat(references) if references else None,
        labels=torch.tensor([row.label for row in trained], dtype=torch.int64),
        units=torch.tensor([row.unit for row in trained], dtype=torch.int64),
    )
