"""Schedule-free AdamW: the rate stays at its peak, and an average of the weights takes the place of the decay.

Paper: Defazio et al., arXiv:2405.15682, algorithm 1. So no length has to be known in advance. The gradient is taken
between the weights that move, z, and their average, which is evaluated and exported.
Cost: AdamW's, and 4 bytes a parameter. The 8-bit moments of --memory 24g are not used.
Expect: python train.py tiny --max-steps 20 --step-file recipes/schedule_free.py: eval/loss 4.261.
Track (benchmarks/track.md): test loss 0.2510, that of the baseline 0.2447.
"""

import torch

from data.base.errors import UserError
from recipes.ema import evaluated_weights  # noqa: F401

BETA, BETA2, EPS = 0.9, 0.999, 1e-8


class ScheduleFree(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state, rate = self.state[p], group["lr"]
                if not state:
                    state |= {"z": p.clone(), "average": p.clone(), "square": torch.zeros_like(p)}
                    state |= {"steps": 0, "rates": 0.0}
                state["steps"], state["rates"] = state["steps"] + 1, state["rates"] + rate**2
                state["square"].mul_(BETA2).addcmul_(p.grad, p.grad, value=1 - BETA2)
                scale = (state["square"] / (1 - BETA2 ** state["steps"])).sqrt_().add_(EPS)
                state["z"].addcdiv_(p.grad, scale, value=-rate).sub_(p, alpha=rate * group["weight_decay"])
                state["average"].lerp_(state["z"], rate**2 / state["rates"] if rate else 0.0)
                p.copy_(state["z"].lerp(state["average"], BETA))


def make_optimizers(model, config):
    trained = [p for p in model.parameters() if p.requires_grad]
    if trained[0].dtype == torch.bfloat16:
        raise UserError("schedule_free.py needs weights in fp32: bf16 would round its updates away (--memory 24g)")
    matrices, norms = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return [ScheduleFree([group for group in groups if group["params"]], {"lr": config.learning_rate})]


def lr_multiplier(step, max_steps, config):
    return min(1.0, (step + 1) / (1 + max_steps * config.warmup_ratio))
