"""TrainState: what the loop knows beside weights and optimizer."""

import dataclasses
import json
from pathlib import Path

from loop.early_stopping import EarlyStopping
from loop.evaluate import mean
from loop.run_folder import Diverged
from loop.step import StepMetrics

MAX_NONFINITE_IN_A_ROW = 3


@dataclasses.dataclass
class TrainState:
    """The same on every rank; in a checkpoint it is trainer.json. Random generators have no part in it."""

    early_stopping: EarlyStopping
    run_id: str  # of SwanLab
    step: int = 0  # completed optimizer steps, skipped ones among them
    tokens_seen: int = 0  # target tokens
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    # Since the last row of train metrics, for its means; think and answer.
    loss_sums: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    num_targets: list[int] = dataclasses.field(default_factory=lambda: [0, 0])

    def record(self, metrics: StepMetrics) -> None:
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

    def take_losses(self) -> dict[str, float]:
        """Mean losses per target token, in nats, over the steps since the last call."""
        (think, answer), (num_think, num_answer) = self.loss_sums, self.num_targets
        self.loss_sums, self.num_targets = [0.0, 0.0], [0, 0]
        return {
            "train/loss": mean(think + answer, num_think + num_answer),
            "train/think_loss": mean(think, num_think),
            "train/answer_loss": mean(answer, num_answer),
        }

    def summary(self, best: Path) -> str:
        stopping = self.early_stopping
        if stopping.best_loss is None:
            return f"step {self.step}, no evaluation with a finite loss"
        return f"step {self.step}; best eval loss {stopping.best_loss:.4f} at step {stopping.best_step}: {best}"

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
    fields = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
    return TrainState(**{**fields, "early_stopping": EarlyStopping(**fields["early_stopping"])})
