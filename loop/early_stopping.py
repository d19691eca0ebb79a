"""When to stop: a state machine fed with the evaluation loss, the same number on every rank."""

import dataclasses


@dataclasses.dataclass
class EarlyStopping:
    """Counts evaluations without progress.

    best_loss is the lowest loss seen; an evaluation resets the count only where it is lower than
    the best before it by more than min_delta. A loss that is NaN is never better.
    """

    patience: int  # evaluations without progress before stopping; 0 never stops
    min_delta: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    patience_count: int = 0

    def update(self, loss: float, step: int) -> bool:
        """Takes the evaluation loss after `step` steps; returns whether it is the lowest so far."""
        progress = self.best_loss is None or loss < self.best_loss - self.min_delta
        self.patience_count = 0 if progress and self.is_better(loss) else self.patience_count + 1
        if self.is_better(loss):
            self.best_loss, self.best_step = loss, step
            return True
        return False

    def is_better(self, loss: float) -> bool:
        return loss < (float("inf") if self.best_loss is None else self.best_loss)

    @property
    def should_stop(self) -> bool:
        return 0 < self.patience <= self.patience_count
