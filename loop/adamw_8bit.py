"""AdamW with moments in 8 bits, from torchao (Dettmers et al., arXiv:2110.02861)."""

import torch

from data.errors import cannot_import


def adamw_8bit(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """2 bytes of moments a parameter; updates of bf16 weights are rounded stochastically. Its first step compiles."""
    try:
        from torchao import optim
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise cannot_import(error, "torchao", "lowmem") from error

    class AdamW8bit(optim.AdamW8bit):
        def step(self, closure=None):
            for state in self.state.values():  # a checkpoint holds a moment as the tensors it is made of
                for name, value in state.items():
                    if isinstance(value, dict):
                        state[name] = OptimState8bit(**value, signed=name == "exp_avg")
            # torchao takes the rate as a tensor only, and would compile again for each new float.
            rates = [group["lr"] for group in self.param_groups]
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.as_tensor(rate, dtype=torch.float32)
            super().step(closure)
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    return AdamW8bit(groups, lr=lr, bf16_stochastic_round=True)
