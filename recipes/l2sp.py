"""L2-SP: in each step the weights decay towards the weights before training, not towards 0.

Paper: Li et al., arXiv:1802.01483; decoupled from the gradient, as AdamW's decay is: the rate times DECAY of the way.
Cost: a copy of the trained weights, one pass over them in each step.
Expect: python train.py tiny --max-steps 20 --step-file recipes/l2sp.py: eval/loss 4.636.
Track (benchmarks/track.md): test loss 0.2583, that of the baseline 0.2447.
"""

import torch

from data.base.errors import UserError
from loop.step import train_step as plain_step

DECAY = 1.0


@torch.no_grad()
def train_step(model, optimizers, batch, accelerator, multiplier, config):
    groups = [(group, optimizer.state) for optimizer in optimizers for group in optimizer.param_groups]
    trained = [(p, group, state) for group, state in groups for p in group["params"]]
    if trained[0][0].dtype == torch.bfloat16:
        raise UserError("l2sp.py needs weights in fp32: bf16 would round its decay away (--memory 24g has them)")
    before = [None if "start" in state[p] else p.clone() for p, _, state in trained]
    with torch.enable_grad():
        metrics = plain_step(model, optimizers, batch, accelerator, multiplier, config)
    for (p, group, state), weight in zip(trained, before, strict=True) if metrics.finite else ():
        if weight is not None:
            state[p]["start"] = weight
        p.lerp_(state[p]["start"], min(1.0, float(group["lr"]) * DECAY))
    return metrics
