"""DPO: of two replies to one prompt, the good one becomes likelier than the bad one, compared with before training.

Paper: Rafailov et al. 2023, arXiv:2305.18290. Pairs are corrections, votes, or files with chosen and rejected: see
docs/feedback.md. --step-set IPO=True: Azar et al. 2023, arXiv:2310.12036, which stops at a margin (of means over the
tokens; DPO takes sums). RPO=1.0 adds the cross-entropy of the good replies, which holds on to them when both replies
become less likely (arXiv:2404.19733). ANSWERS_ALONE=True: the answers are compared, after the good reply's thinking.
Cost: a forward more in each step, and one of all pairs before the first; no second model.
Expect: python train.py preference --model tiny --dataset sample-feedback --learning-rate 1e-4 --max-steps 20:
eval/preference/loss 0.564.
"""

from torch.nn.functional import logsigmoid

from loop.preference import BAD, GOOD, held_out, log_ratios, weighted_backward, with_weights

REFERENCE = "losses"
PREFERENCE = "pairs"
METRIC_FOR_BEST_MODEL = "eval/preference/loss"
BETA = 0.1
IPO = False
RPO = 0.0
ANSWERS_ALONE = False


def loss_of(ratios, counts):
    """Of each pair, (units,). ratios: log p(now) - log p(before) of the replies, (units, 3); counts: their tokens."""
    if IPO:
        ratios = ratios / counts.clamp(min=1)
        return (ratios[:, GOOD] - ratios[:, BAD] - 1 / (2 * BETA)) ** 2
    return -logsigmoid(BETA * (ratios[:, GOOD] - ratios[:, BAD]))


def forward_backward(model, batch, accelerator, config):
    ratios, counts = log_ratios(model, batch, accelerator)
    losses, weights = with_weights(loss_of, ratios, counts)
    batch.log("preference_loss", losses)
    batch.log("good_log_ratio", ratios[:, GOOD])
    batch.log("bad_log_ratio", ratios[:, BAD])
    weights = weights / batch.num_units
    weights[:, GOOD] += RPO / batch.num_targets
    return weighted_backward(model, batch, accelerator, weights)


def evaluators(data, config):
    return [held_out(data, loss_of)]
