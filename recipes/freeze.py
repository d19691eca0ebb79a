"""Freeze: the embeddings and the lower SHARE of the layers stay as they are; a tied head stays with the embeddings.

Paper: Lee et al., arXiv:1911.03090 (how many layers of a pretrained model have to be trained).
Cost: none. What is frozen needs no gradient, no moments and no activations.
Expect: python train.py tiny --max-steps 20 --step-file recipes/freeze.py: eval/loss 7.098.
Track (benchmarks/track.md): test loss 2.9053, that of the baseline 0.2447.
"""

from loop.step import make_optimizers as plain_optimizers

SHARE = 0.5


def make_optimizers(model, config):
    inner = model.causal_lm.model
    for module in [inner.embed_tokens, *inner.layers[: int(SHARE * len(inner.layers))]]:
        module.requires_grad_(False)
    return plain_optimizers(model, config)
