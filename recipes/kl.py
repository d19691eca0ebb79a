"""KL: the loss, and BETA times the divergence from the model before training, KL(before || now), of each target.

That divergence is what forgetting follows (arXiv:2509.04259). ASFT (arXiv:2509.23753): --step-set WEIGHTED=True, which
also weights each cross-entropy by the probability of its target.
Cost: a forward of the model before training, 1/3 of a step; its weights in bf16 (3.2 GiB for Qwen3-1.7B), under LoRA
none.
Expect: python train.py tiny --max-steps 20 --step-file recipes/kl.py: eval/loss 4.644.
"""

from loop.step import part_weights

REFERENCE = "logits"
BETA = 0.1
WEIGHTED = False


def divergence(logits, ids, before):
    log_p, log_q = before.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def micro_batch_loss(model, micro_batch, batch, config):
    losses, kl = model(**micro_batch.inputs, of_logits=divergence)
    batch.log("kl", kl)
    weights = (-losses.detach()).exp() if WEIGHTED else 1.0
    return ((losses * weights + BETA * kl) * part_weights(micro_batch, config)).sum() / batch.num_targets, losses
