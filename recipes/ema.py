"""EMA: an exponential average of the weights is evaluated, answers the samples, and is exported as best/.

Paper: Polyak and Juditsky 1992; the warm-up of the decay, min(DECAY, (1 + n) / (10 + n)), is that of TensorFlow's
ExponentialMovingAverage. Cost: 4 bytes a parameter, in fp32 whatever the weights are, and one pass over the weights in
each step; in an evaluation, where there are no gradients, a copy of the weights.
Checkpoints hold the average in optimizer.state.
Expect: python train.py tiny --max-steps 20 --step-file recipes/ema.py: eval/loss 4.671.
Track (benchmarks/track.md): test loss 0.2448, that of the baseline 0.2447.
"""

from contextlib import contextmanager

import torch

from loop.step import train_step as plain_step

DECAY = 0.999


@torch.no_grad()
def train_step(model, optimizers, batch, accelerator, multiplier, config):
    with torch.enable_grad():
        metrics = plain_step(model, optimizers, batch, accelerator, multiplier, config)
    states = [pair for optimizer in optimizers for pair in optimizer.state.items()]
    for parameter, state in states if metrics.finite else ():
        n = state["updates"] = state.get("updates", 0) + 1
        if "average" not in state:
            state["average"] = parameter.float().clone()  # bf16 would round most updates away
        state["average"].lerp_(parameter.float(), 1 - min(DECAY, (1 + n) / (10 + n)))
    return metrics


@contextmanager
@torch.no_grad()
def evaluated_weights(model, optimizers):
    """Within it the model has the averages as its weights; before the first update, its own."""
    averages = [(p, state["average"]) for o in optimizers for p, state in o.state.items() if "average" in state]
    own = [parameter.clone() for parameter, _ in averages]
    for parameter, average in averages:
        parameter.copy_(average)
    try:
        yield
    finally:
        for (parameter, _), weight in zip(averages, own, strict=True):
            parameter.copy_(weight)
