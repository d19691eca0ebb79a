"""AdamW with moments in 8 bits, from torchao (Dettmers et al., arXiv:2110.02861)."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from data.base.errors import cannot_import


def adamw_8bit(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """2 bytes of moments a parameter; updates of bf16 weights are rounded stochastically. Its first step compiles."""
    if isinstance(groups[0]["params"][0], FakeTensor):
        return Bytes(groups, {"lr": lr})
    optim, OptimState8bit = import_torchao()

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


def import_torchao():
    """(torchao.optim, OptimState8bit). Raises UserError without it."""
    try:
        from torchao import optim
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise cannot_import(error, "torchao", "lowmem") from error
    return optim, OptimState8bit


class Bytes(torch.optim.Optimizer):
    """In the place of torchao's, whose step no fake tensor goes through: a byte for each moment, a scale in fp32 for
    every 256 of them, and the two fp32 temporaries of a parameter that its compiled step allocates."""

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                sizes = [p.numel(), p.numel(), p.numel() // 64, p.numel() // 64]
                if not self.state[p]:
                    self.state[p] = {str(n): p.new_empty(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
                temporaries = [torch.empty_like(p, dtype=torch.float32) for _ in range(2)]
                p.grad.add_(temporaries[0])


Bytes.__name__ = "AdamW8bit"
