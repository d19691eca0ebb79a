"""Data: the rows of a run, encoded, and the batches that are made of them."""

import dataclasses
from collections.abc import Sequence

from data.batches import Batch, rank_rows, step_batch, steps_per_epoch
from data.encode import Example
from data.encoded import Encoded, Wordings, encode_split
from data.split import Split, load_split


@dataclasses.dataclass
class Data:
    """Every rank holds the same rows; batches are this rank's share. config: a loop.config.TrainConfig."""

    split: Split
    tokenizer: object
    train: Encoded
    val: Encoded
    wordings: Wordings
    rank: int
    world_size: int

    def rows_per_step(self, config) -> int:
        return config.per_device_train_batch_size * config.gradient_accumulation_steps * self.world_size

    def steps_per_epoch(self, config) -> int:
        return steps_per_epoch(len(self.train), self.rows_per_step(config))

    def batch(self, step: int, config) -> Batch:
        """What the update after `step` completed steps trains on."""
        packing = self.packing(config, config.per_device_train_batch_size)
        examples = self.wordings.in_epoch(step // self.steps_per_epoch(config))
        return step_batch(step, examples, rows_per_step=self.rows_per_step(config), seed=config.seed, **packing)

    def eval_rows(self, rows: Sequence[Example], config) -> list[list[Example]]:
        """This rank's share of rows to evaluate on, as it is laid into micro-batches."""
        batch_size = config.per_device_eval_batch_size
        packing = self.packing(config, config.per_device_train_batch_size)
        if batch_size > 0:
            packing |= {"batch_size": batch_size, "micro_batch_tokens": 0}
        return rank_rows(rows, **packing)

    def labels_of(self, groups: list[list[Example]]) -> list[list[tuple[tuple[str, ...], int]]]:
        """Of each row of each of `eval_rows`: its set and group, and its number of targets. Empty if no row of any
        rank has one."""
        if not self.split.labels:
            return []
        return [
            [(self.split.labels.get(row.location, ()), len(row) - row.prompt_length) for row in rows] for rows in groups
        ]

    def packing(self, config, batch_size: int) -> dict:
        """How this rank lays its rows into micro-batches: keywords of `rank_rows`."""
        tokens = config.micro_batch_tokens
        return dict(batch_size=batch_size, micro_batch_tokens=tokens, rank=self.rank, world_size=self.world_size)


def load_data(config, make_tokenizer, rank: int, world_size: int) -> Data:
    """make_tokenizer: from the texts of the training rows. Raises UserError if nothing can be trained on."""
    split = load_split(config)
    tokenizer = make_tokenizer(split.texts())
    train, val, wordings = encode_split(split, tokenizer, config.max_length, config.overlong)
    return Data(split, tokenizer, train, val, wordings, rank, world_size)
