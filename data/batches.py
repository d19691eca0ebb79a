"""Step -> micro-batches: the order of rows, a rank's share of them, and their collation.

Everything here is a pure function of (seed, step), so a resumed run needs no sampler state.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from data.encode import Example


class StepBatch(NamedTuple):
    """One rank's part of the global batch of one step, and what is known of the whole of it."""

    micro_batches: list[dict]
    num_tokens: int  # all positions of the global batch, prompts too; there is no padding
    epoch: float  # passes over the rows completed after this step
    rows: list[str]  # where the rows of the global batch stand


def steps_per_epoch(num_examples: int, rows_per_step: int) -> int:
    """Optimizer steps in one pass; the last one of an epoch may be short."""
    return math.ceil(num_examples / rows_per_step)


def step_indices(step: int, *, num_examples: int, rows_per_step: int, seed: int) -> list[int]:
    """Indices of the global batch of the update that follows `step` completed steps."""
    epoch, position = divmod(step, steps_per_epoch(num_examples, rows_per_step))
    order = list(range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[position * rows_per_step : (position + 1) * rows_per_step]


def step_batch(
    step: int,
    examples: Sequence[Example],
    *,
    rows_per_step: int,
    seed: int,
    **cut,
) -> StepBatch:
    """What a rank trains on after `step` completed steps; cut: the keywords of `rank_batches`."""
    indices = step_indices(step, num_examples=len(examples), rows_per_step=rows_per_step, seed=seed)
    return StepBatch(
        micro_batches=rank_batches(examples, indices, **cut),
        num_tokens=sum(len(examples[index]) for index in indices),
        epoch=(step + 1) / steps_per_epoch(len(examples), rows_per_step),
        rows=[examples[index].where for index in indices],
    )


def rank_batches(
    examples: Sequence[Example],
    indices: Sequence[int],
    *,
    batch_size: int,
    micro_batch_tokens: int,
    rank: int,
    world_size: int,
) -> list[dict]:
    """One rank's share of `indices` as micro-batches: rows laid end to end, as `cut` puts them together.

    Every rank gets the same number of micro-batches, for each forward and backward may be a
    collective; a rank short of rows ends with micro-batches that have no target and sum to 0.
    """
    shares = share_out([examples[index] for index in indices], world_size)
    cuts = [cut(share, batch_size, micro_batch_tokens) for share in shares]
    batches = [collate(rows) for rows in cuts[rank]]
    while len(batches) < max(map(len, cuts)):
        first = examples[indices[0]]
        batches.append(collate([Example(first.input_ids[:2], 2, 2, first.where)]))
    return batches


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


def cut(rows: Sequence[Example], batch_size: int, micro_batch_tokens: int) -> list[list[Example]]:
    """Rows put together batch_size at a time; where micro_batch_tokens is above 0, in as few micro-batches as
    that many tokens each allow (first fit, the longest row first; a longer row is alone)."""
    if not micro_batch_tokens:
        return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    batches = []
    for row in sorted(rows, key=len, reverse=True):
        for batch in batches:
            if sum(map(len, batch)) + len(row) <= micro_batch_tokens:
                batch.append(row)
                break
        else:
            batches.append([row])
    return batches


def collate(examples: Sequence[Example]) -> dict:
    """Rows laid end to end without padding.

    input_ids, position_ids: (1, T) int64. cu_seqlens: (N + 1) int32, where each of the N rows begins,
    and T. max_seqlen: int. target_positions, target_ids, is_think: (n,), the position whose
    hidden state predicts a target, the target's id, and whether it belongs to the thinking.
    """
    lengths = [len(example) for example in examples]
    offsets = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    input_ids = torch.cat([example.input_ids for example in examples])
    targets = [
        torch.arange(offset + example.prompt_length, offset + len(example))
        for offset, example in zip(offsets, examples, strict=False)
    ]
    is_think = [torch.arange(example.prompt_length, len(example)) < example.answer_start for example in examples]
    targets = torch.cat(targets)
    return {
        "input_ids": input_ids.unsqueeze(0),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "cu_seqlens": torch.tensor(offsets, dtype=torch.int32),
        "max_seqlen": max(lengths),
        "target_positions": targets - 1,
        "target_ids": input_ids[targets],
        "is_think": torch.cat(is_think),
    }
