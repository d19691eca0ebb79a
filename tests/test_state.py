import math

import pytest

from loop.state import TrainState


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "stops_at", "best"),
    [
        (2, 0.0, [3.0, 2.0, 2.5, 2.5], 4, (2.0, 2)),
        (2, 0.0, [3.0, 2.0, 2.5, 1.9, 2.0, 2.0], 6, (1.9, 4)),
        (1, 0.0, [3.0, 3.0], 2, (3.0, 1)),  # equal is no progress
        (2, 0.5, [3.0, 2.8, 2.6], 3, (2.6, 3)),  # lower, and so the best model, but by too little
        (2, 0.0, [math.nan, math.nan], 2, (None, 0)),  # NaN is never the best
        (2, 0.0, [3.0, math.nan, 2.0, 2.5, math.inf], 5, (2.0, 3)),
        (0, 0.0, [1.0, 2.0, 3.0, 4.0], None, (1.0, 1)),
    ],
)
def test_stops_after_patience_evaluations_without_progress(patience, min_delta, losses, stops_at, best):
    state, stopped = TrainState(""), None
    for state.step, loss in enumerate(losses, start=1):
        is_best = state.is_better(loss)
        state.evaluated(loss, min_delta, is_best)
        assert is_best == (state.best_step == state.step) and state.last_eval == state.step
        if state.is_out_of_patience(patience):
            stopped = state.step
            break
    assert stopped == stops_at
    assert (state.best_loss, state.best_step) == best
