"""What the loop knows besides weights and optimizers: TrainState, and what one step did: StepMetrics."""

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from data.base.errors import UserError
from loop.score import mean, total

MAX_NONFINITE_IN_A_ROW = 3


class Diverged(UserError):
    status = "diverged"


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

    @classmethod
    def of(cls, batch, loss_sums: torch.Tensor, grad_norm: torch.Tensor) -> "StepMetrics":
        """loss_sums: (micro-batches of all ranks, 2), think and answer. One copy to the host, where fsum is exact:
        the sums do not depend on the order of ranks, and no device needs fp64."""
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        numbers = torch.cat([loss_sums.flatten(), grad_norm.reshape(1)])
        if isinstance(numbers, FakeTensor):  # the step is tried before the run: see loop/start/trial.py
            return cls(0.0, 0.0, batch.num_think_targets, batch.num_answer_targets, grad_norm=1e3)
        *sums, grad_norm = numbers.tolist()
        return cls(total(sums[::2]), total(sums[1::2]), batch.num_think_targets, batch.num_answer_targets, grad_norm)


@dataclasses.dataclass
class TrainState:
    """The same on every rank; in a checkpoint it is trainer.json. Random generators have no part in it."""

    run_id: str  # of SwanLab
    step: int = 0  # completed optimizer steps, skipped ones among them
    tokens_seen: int = 0  # target tokens
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    # Since the last row of train metrics, for its means; think and answer.
    loss_sums: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    num_targets: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    logged: dict[str, list] = dataclasses.field(default_factory=dict)  # by batch.log: name -> [sum, number] of each
    # Evaluations: the step of the last one, the lowest loss and its step, those in a row without a better loss.
    last_eval: int = -1
    best_loss: float | None = None
    best_step: int = 0
    patience_count: int = 0
    # Measure -> its table before the first step, if it needs that: row, part, loss, tokens, of which right.
    first: dict[str, list[list]] = dataclasses.field(default_factory=dict)

    def stepped(self, metrics: StepMetrics) -> None:
        """Counts one more step, whose losses enter the means if it updated the weights."""
        self.step += 1
        if not metrics.finite:
            self.nonfinite_steps += 1
            self.nonfinite_in_a_row += 1
            return
        self.nonfinite_in_a_row = 0
        self.loss_sums[0] += metrics.think_loss_sum
        self.loss_sums[1] += metrics.answer_loss_sum
        self.num_targets[0] += metrics.num_think_tokens
        self.num_targets[1] += metrics.num_answer_tokens
        self.tokens_seen += metrics.num_think_tokens + metrics.num_answer_tokens

    def is_better(self, loss: float) -> bool:
        """Whether it is the lowest so far; NaN never is."""
        return loss < (math.inf if self.best_loss is None else self.best_loss)

    def evaluated(self, loss: float, min_delta: float, is_best: bool) -> None:
        """Counts an evaluation. Only a loss lower than the best by more than min_delta resets the patience."""
        progress = self.best_loss is None or loss < self.best_loss - min_delta
        self.patience_count = 0 if progress and is_best else self.patience_count + 1
        self.last_eval = self.step
        if is_best:
            self.best_loss, self.best_step = loss, self.step

    def is_out_of_patience(self, patience: int) -> bool:
        """After that many evaluations in a row without a better loss; 0 is endless patience."""
        return 0 < patience <= self.patience_count

    def take_losses(self) -> dict[str, float]:
        """Mean losses per target token, in nats, over the steps since the last call."""
        (think, answer), (num_think, num_answer) = self.loss_sums, self.num_targets
        self.loss_sums, self.num_targets = [0.0, 0.0], [0, 0]
        return {
            "train/loss": mean(think + answer, num_think + num_answer),
            "train/think_loss": mean(think, num_think),
            "train/answer_loss": mean(answer, num_answer),
        }

    def take_logged(self) -> dict[str, float]:
        """Means of what the step logged since the last call."""
        sums, self.logged = self.logged, {}
        return {
            f"method/{name}": mean(total([one for one, _ in pairs]), sum(number for _, number in pairs))
            for name, pairs in sorted(sums.items())
        }

    def check_divergence(self, max_steps: int) -> None:
        """Raises Diverged after more than 3 skipped steps in a row, or more than 1 % of the run (3 at least)."""
        most = max(MAX_NONFINITE_IN_A_ROW, max_steps // 100)
        if self.nonfinite_in_a_row > MAX_NONFINITE_IN_A_ROW or self.nonfinite_steps > most:
            raise Diverged(
                f"diverged: the gradient norm was not finite in {self.nonfinite_in_a_row} steps in a row, "
                f"{self.nonfinite_steps} in all, up to step {self.step}. Weights and checkpoints are intact. Start "
                "another run with a lower --learning-rate, or look at the rows named above"
            )


def read_state(checkpoint: Path) -> TrainState:
    state = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
    if before := state.pop("before", []):  # in a checkpoint of an earlier version
        state["first"] = {"forget": before}
    return TrainState(**state)


def learning_rates(optimizers: list) -> dict[str, float]:
    """That of the first group, and of each group with another peak, by its `name` or number."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = {"train/learning_rate": groups[0]["lr"]}
    for index, group in enumerate(groups):
        if group["initial_lr"] != groups[0]["initial_lr"]:
            rates[f"train/learning_rate/{group.get('name', index)}"] = group["lr"]
    return rates
