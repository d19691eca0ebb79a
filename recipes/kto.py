"""KTO: replies with a thumb, as they are; no pairs. A good one becomes likelier than before training, a bad one less.

Paper: Ethayarajh et al. 2024, arXiv:2402.01306. How far the whole model has gone from the one before training is
measured on replies put after other prompts; good and bad replies are compared with that. LIKED and DISLIKED are their
weights: with few dislikes, --step-set DISLIKED=3.0 lets each count for more.
ANSWERS_ALONE=True: the answers are judged, without the thinking before them.
Cost: two forwards more in each step, and one of twice the replies before the first; no second model.
Expect: python train.py preference --step-file recipes/kto.py --model tiny --dataset sample-feedback
--learning-rate 1e-4 --max-steps 20: eval/preference/loss 0.484.
"""

import torch

from loop.preference import BAD, GOOD, OTHER, held_out, log_ratios, weighted_backward, with_weights

REFERENCE = "losses"
PREFERENCE = "thumbs"
METRIC_FOR_BEST_MODEL = "eval/preference/loss"
BETA = 0.1
LIKED = 1.0
DISLIKED = 1.0
ANSWERS_ALONE = False


def loss_of(ratios, counts):
    """Of each reply, (units,). ratios: log p(now) - log p(before), (units, 3); counts: tokens, 0 without a reply."""
    kl = (ratios[:, OTHER].sum() / (counts[:, OTHER] > 0).sum().clamp(min=1)).clamp(min=0).detach()
    liked = LIKED * (1 - torch.sigmoid(BETA * (ratios[:, GOOD] - kl)))
    disliked = DISLIKED * (1 - torch.sigmoid(BETA * (kl - ratios[:, BAD])))
    return torch.where(counts[:, GOOD] > 0, liked, disliked)


def forward_backward(model, batch, accelerator, config):
    ratios, counts = log_ratios(model, batch, accelerator)
    losses, weights = with_weights(loss_of, ratios, counts)
    batch.log("preference_loss", losses)
    return weighted_backward(model, batch, accelerator, weights / batch.num_units)


def evaluators(data, config):
    return [held_out(data, loss_of)]
