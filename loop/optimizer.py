"""The optimizer and its learning rate. Swap the optimizer here; `loop/step.py` only calls `step()`."""

import math

import torch


def make_optimizer(model: torch.nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; matrices and embeddings decay, vectors (the norms) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # A parameter that no group holds would never learn, in silence.
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True)


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
