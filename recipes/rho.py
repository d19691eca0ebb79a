"""Rho: of each row only the SHARE of targets on which the model is worst, compared with the model before training.

Paper: Rho-1, arXiv:2404.07965: the excess loss, now minus the reference's, decides. Its reference has been trained on
better data; here it is the model before training, so what has been learned least is trained. Chosen by row, which is
never cut, so packing and ranks choose the same targets; the paper chooses by batch.
Cost: one forward of all training rows before the first step, kept as 4 bytes a target; no memory afterwards.
Expect: python train.py tiny --max-steps 20 --step-file recipes/rho.py: eval/loss 5.213.
"""

import math

import torch

from loop.step import part_weights

REFERENCE = "losses"
SHARE = 0.6


def micro_batch_loss(model, micro_batch, batch, config):
    losses = model(**micro_batch.inputs)
    by_row = (losses.detach() - micro_batch.reference).split(micro_batch.num_targets)
    chosen = [excess >= excess.topk(math.ceil(SHARE * len(excess))).values[-1] for excess in by_row]
    chosen = torch.cat(chosen) if chosen else losses.new_zeros(0, dtype=torch.bool)
    batch.log("chosen", chosen)
    return (losses * chosen * part_weights(micro_batch, config)).sum() / batch.num_targets, losses
