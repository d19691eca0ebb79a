"""The optimizer and its learning rate. Swap the optimizer here; `loop/step.py` only calls `step()`."""

import math

import torch

from loop.run_folder import RunError


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, optim: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW; matrices and embeddings decay, vectors (the norms) do not. optim: adamw, or adamw_8bit."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # A parameter that no group holds would never learn, in silence.
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    if optim == "adamw_8bit":
        return make_adamw_8bit(groups, learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


def make_adamw_8bit(groups: list[dict], learning_rate: float) -> torch.optim.Optimizer:
    """torchao's AdamW with moments in 8 bits; bf16 weights are rounded stochastically. Compiles in its first step."""
    try:
        from torchao import optim
    except ImportError as error:
        raise RunError('this memory profile needs torchao: pip install -e ".[lowmem]"') from error

    class AdamW8bit(optim.AdamW8bit):
        def step(self, closure=None):
            # torchao takes the rate as a tensor only, and a new float would be compiled anew.
            rates = [group["lr"] for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.as_tensor(rate, dtype=torch.float32)
            super().step(closure)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    return AdamW8bit(groups, lr=learning_rate, bf16_stochastic_round=True)


def lr_at(step: int, *, max_steps: int, learning_rate: float, lr_scheduler_type: str, warmup_ratio: float) -> float:
    """Learning rate of the update that follows `step` completed steps.

    A pure function, so that there is no scheduler state to save. The values are those of
    transformers' `get_scheduler` under the same names, with ceil(max_steps * warmup_ratio) warmup steps.
    """
    warmup_steps = math.ceil(max_steps * warmup_ratio)
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    decay = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }
    return learning_rate * decay[lr_scheduler_type]
