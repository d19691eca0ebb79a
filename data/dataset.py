"""Data: the rows of a run, encoded, and the batches that are made of them."""

import dataclasses

from data.batches import Batch, step_batch, steps_per_epoch
from data.encode import Example
from data.encoded import Encoded, encode_split
from data.replies import read_replies
from data.split import Split, load_split


@dataclasses.dataclass
class Data:
    """Every rank holds the same rows; batches are this rank's share. config: a loop.config.TrainConfig."""

    split: Split
    tokenizer: object
    train: Encoded
    val: list[Example]
    rank: int
    world_size: int
    replies: list[Example] = dataclasses.field(default_factory=list)  # of the model before training

    def rows_per_step(self, config) -> int:
        return config.per_device_train_batch_size * config.gradient_accumulation_steps * self.world_size

    def steps_per_epoch(self, config) -> int:
        return steps_per_epoch(len(self.train), self.rows_per_step(config))

    def batch(self, step: int, config) -> Batch:
        """What the update after `step` completed steps trains on."""
        return step_batch(
            step,
            self.train,
            rows_per_step=self.rows_per_step(config),
            seed=config.seed,
            batch_size=config.per_device_train_batch_size,
            micro_batch_tokens=config.micro_batch_tokens,
            rank=self.rank,
            world_size=self.world_size,
        )


def load_data(config, make_tokenizer, rank: int, world_size: int) -> Data:
    """make_tokenizer: from the texts of the training rows. Raises UserError if nothing can be trained on."""
    split = load_split(config)
    tokenizer = make_tokenizer(split.texts())
    train, val = encode_split(split, tokenizer, config.max_length, config.overlong)
    return Data(split, tokenizer, train, val, rank, world_size, read_replies(config.forget, tokenizer))
