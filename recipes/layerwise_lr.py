"""Layer-wise learning rates: each layer 0.9 times the rate of the one above it, the embeddings lowest.

Paper: ULMFiT's discriminative fine-tuning (Howard and Ruder, arXiv:1801.06146); BERT-style decay (arXiv:2006.05987).
Cost: no memory, no time. A tied head has the rate of the embeddings.
Expect: python train.py tiny --max-steps 20 --step-file recipes/layerwise_lr.py: eval/loss 4.835.
Track (benchmarks/track.md): test loss 0.2413, that of the baseline 0.2447.
"""

import torch

from model.adamw_8bit import adamw_8bit

DECAY = 0.9  # from one layer to the one below it


def make_optimizers(model, config) -> list[torch.optim.Optimizer]:
    """A group for each depth and decay; the `lr` of a group is that group's peak."""
    num_layers = model.causal_lm.config.num_hidden_layers
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        _, _, inner = name.partition("model.layers.")
        depth = int(inner.split(".")[0]) + 1 if inner else 0 if "embed_tokens" in name else num_layers + 1
        group = groups.setdefault((depth, parameter.ndim >= 2), {"params": []})
        group["params"].append(parameter)
        group["name"] = f"depth {depth}"
        group["lr"] = config.learning_rate * DECAY ** (num_layers + 1 - depth)
        group["weight_decay"] = config.weight_decay if parameter.ndim >= 2 else 0.0
    if config.optim == "adamw_8bit":
        return [adamw_8bit(list(groups.values()), lr=config.learning_rate)]
    return [torch.optim.AdamW(groups.values(), lr=config.learning_rate, fused=True)]
