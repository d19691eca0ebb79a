"""What a step keeps beside weights and states, phase by phase: from what autograd was seen to keep of one token."""

import itertools

import torch

from loop.config import Resolved
from model.qwen3 import is_recurrent

# Bytes that autograd keeps of one token in one layer, for each of hidden_size, query, key and intermediate_size, by
# what decides them: (bytes of a weight, of a number in a matrix product, layers are compiled). tests/test_cuda_fake.py
# holds them against the tensors of a step.
KEPT = {
    (4, 2, False): (26, 10, 10, 8),
    (4, 2, True): (10, 6, 6, 6),
    (2, 2, False): (16, 10, 10, 8),
    (2, 2, True): (8, 6, 6, 6),
    (4, 4, False): (24, 16, 28, 16),
    (4, 4, True): (24, 16, 28, 16),
}
# By whether layers are compiled, and whether they are in 4 bits, whose products are no part of a graph.
KEPT_BY_LORA = {(0, 0): (18, 10, 8, 8), (1, 0): (10, 8, 6, 6), (0, 1): (18, 10, 8, 8), (1, 1): (14, 8, 6, 8)}
# Of a recurrent layer of Qwen3.5 in the place of attention, for each of hidden_size, keys and values, without kernels
# (which keep less); and what its other layers keep of their gate, for each of query.
KEPT_BY_RECURRENCE, KEPT_BY_GATE = (2, 6, 97), 8.5


def phases_of_a_step(
    profile, config: Resolved, causal_lm, tokens: int, several: bool, shards: int
) -> list[dict[str, float]]:
    """Bytes of each item beside weights and states, in the order of a step; the phase that needs most is the peak.
    profile: a `loop.start.memory.Profile`."""
    c, layers = causal_lm.config, causal_lm.model.layers
    width, compiled, checkpointing = profile.weights.itemsize, config.compile == "on", profile.gradient_checkpointing
    half = 2 if config.mixed_precision == "bf16" or width == 2 else 4  # bytes of a number in a matrix product
    trained = sum(parameter.numel() for parameter in causal_lm.parameters() if parameter.requires_grad)
    # Layers below the first trained parameter keep nothing; frozen ones above it keep about what LoRA keeps.
    reached = layers if causal_lm.model.embed_tokens.weight.requires_grad else [*itertools.dropwhile(is_frozen, layers)]
    in_reached = sum(parameter.numel() for layer in reached for parameter in layer.parameters())
    in_layers = sum(parameter.numel() for parameter in layers.parameters() if parameter.requires_grad)
    of_lora = KEPT_BY_LORA[compiled, config.frozen == "nf4"]
    tables = [of_lora if is_part_frozen(layer) else KEPT[width, half, compiled] for layer in reached]
    by_layer = [tokens * kept_in_layer(c, layer, table) for layer, table in zip(reached, tables, strict=True)]
    layer = max(by_layer, default=0)
    residual = tokens * c.hidden_size * (width if half == width else 4)
    kept = len(reached) * residual if checkpointing else sum(by_layer)
    gradients = trained * itemsize_of_gradients(profile, config) / shards
    head = c.vocab_size * c.hidden_size
    head_gradient = 4 * head * causal_lm.lm_head.weight.requires_grad
    embedding_gradient = width * head * several * causal_lm.model.embed_tokens.weight.requires_grad
    copies = half * in_reached * (half < width and not checkpointing)
    return [
        {
            "gradients": gradients * several,
            "activations": kept + 22 * tokens * c.hidden_size,  # the norm before the head, and the rows of targets
            "logits": min(tokens, profile.loss_chunk) * c.vocab_size * half + 4 * 2**24 * (config.compile == "off"),
            "the head's gradient, and its copy in bf16": head_gradient + head * half * (half < width),
            "bf16 copies of the weights": copies,
        },
        {  # the backward of the last layer
            "gradients": gradients * several,
            "activations": kept + 1.5 * layer * checkpointing,
            "the head's gradient": head_gradient,
            "bf16 copies of the weights": copies,
        },
        {  # of the first
            "gradients": gradients * several or in_layers * width / shards,
            "activations": 1.5 * layer,
            "the head's gradient": head_gradient,
        },
        {  # of the embedding
            "gradients": gradients,
            "the head's and the embedding's, apart": head_gradient * c.tie_word_embeddings + embedding_gradient,
        },
    ]


def itemsize_of_gradients(profile, config: Resolved) -> int:
    """Bytes of a number: as of the weight, which is in fp32 beside weights in 4 bits."""
    return profile.weights.itemsize if config.frozen == "full" else 4


def is_frozen(layer: torch.nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())


def is_part_frozen(layer: torch.nn.Module) -> bool:
    return not all(parameter.requires_grad for parameter in layer.parameters())


def kept_in_layer(c, layer: torch.nn.Module, factors: tuple) -> float:
    """Bytes of one token; factors: of KEPT."""
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    query, value = c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim
    by_hidden, by_query, by_value, by_mlp = factors
    kept = by_hidden * c.hidden_size + by_mlp * c.intermediate_size
    if hasattr(layer, "linear_attn"):
        keys = c.linear_num_key_heads * c.linear_key_head_dim
        values = c.linear_num_value_heads * c.linear_value_head_dim
        by_hidden, by_key, by_value = KEPT_BY_RECURRENCE
        return kept + by_hidden * c.hidden_size + by_key * keys + by_value * values
    gate = KEPT_BY_GATE * query * is_recurrent(c)
    return kept + by_query * query + by_value * value + gate
