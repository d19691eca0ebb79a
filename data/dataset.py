"""Data: the rows of a run, encoded, and the batches that are made of them."""

import dataclasses
import functools

from data.base.errors import UserError
from data.batches import Batch, step_batch, steps_per_epoch
from data.compared import encode_compared
from data.encode import Example
from data.encoded import Encoded, encode_all, encode_split
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
    held: Encoded | None = None  # replies that are compared at each evaluation

    def rows_per_step(self, config) -> int:
        return config.per_device_train_batch_size * config.gradient_accumulation_steps * self.world_size

    def steps_per_epoch(self, config) -> int:
        return steps_per_epoch(self.train.num_units, self.rows_per_step(config))

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


def load_data(
    config, make_tokenizer, rank: int, world_size: int, preference: str = "", answers_alone: bool = False
) -> Data:
    """make_tokenizer: from the texts of the training rows. preference: pairs or thumbs, if the method compares replies;
    answers_alone: without their thinking. Raises UserError if nothing can be trained on."""
    split = load_split(config, preference)
    tokenizer = make_tokenizer(split.texts())
    settings = {"tokenizer": tokenizer, "max_length": config.max_length, "overlong": config.overlong}
    rows = functools.partial(encode_all, **settings)
    compared = functools.partial(encode_compared, **settings, kind=preference, answers_alone=answers_alone)
    encode = {"train": compared, "val": rows, "held": compared} if preference else {"train": rows, "val": rows}
    sides = encode_split(split, encode, config.max_length)
    if preference == "thumbs" and 0 not in sides["train"].labels:
        raise UserError("the replies with a thumb are to one prompt, or all the same; KTO needs others to compare with")
    replies = read_replies(config.forget, tokenizer)
    return Data(split, tokenizer, sides["train"], [*sides["val"]], rank, world_size, replies, sides.get("held"))
