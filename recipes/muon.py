"""Muon for the matrices of the layers; AdamW for embeddings, head and norms, each with its own peak rate.

Source: Jordan et al., https://kellerjordan.github.io/posts/muon/; the scaling that lets it use AdamW's rate and decay
is that of arXiv:2502.16982. torch.optim.Muon.
Cost: 4 bytes less a matrix element than AdamW (one moment); five products of matrices more in each update, of which
FSDP2 gathers what it needs. The 8-bit moments of --memory 24g are not used.
Weights that AdamW pretrained, as Qwen3's, are reported to lose by it if all of them are trained (arXiv:2605.10468).
Expect: python train.py tiny --max-steps 20 --step-file recipes/muon.py: eval/loss 3.624.
"""

import torch

from data.base.errors import UserError

MUON_LR = 1.0  # peak of Muon, times learning_rate


def make_optimizers(model, config) -> list[torch.optim.Optimizer]:
    """Every trained parameter is in exactly one group; the `lr` of a group is that group's peak."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(p.dtype == torch.bfloat16 for p in trained.values()):
        raise UserError("muon.py needs weights in fp32: bf16 would round its updates away (--memory 24g has them)")
    matrices = [p for name, p in trained.items() if p.ndim == 2 and "model.layers." in name]
    tables = [p for name, p in trained.items() if p.ndim == 2 and "model.layers." not in name]
    groups = [
        {"params": tables, "weight_decay": config.weight_decay},
        {"params": [p for p in trained.values() if p.ndim != 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # none under LoRA, which trains matrices of layers alone
    muon = {"lr": MUON_LR * config.learning_rate, "weight_decay": config.weight_decay}
    muon = [{"name": "muon", "params": matrices, **muon}] if matrices else []
    optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)] if groups else []
    return optimizers + ([torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw")] if muon else [])
