"""Memory profiles: what each of them sets and changes, and the bytes that a run will need.

The prediction is an upper bound in eager mode; compiled layers keep less. GiB are 2**30 bytes.
"""

import os
from typing import NamedTuple

import psutil
import torch

from data.errors import UserError
from loop.config import TrainConfig
from loop.console import warn

GIB = 2**30
# Fixed costs besides the tensors: the CUDA context and what the allocator cannot use; Python and its libraries.
OVERHEAD = {"cuda": 1.0 * GIB, "cpu": 0.7 * GIB}


class Profile(NamedTuple):
    gradient_checkpointing: bool
    micro_batch_tokens: int  # 0: per_device_train_batch_size rows each
    loss_chunk: int  # targets whose logits exist at one time
    weights: torch.dtype  # of the gradients too
    optim: str  # adamw, or adamw_8bit: moments in 8 bits, from torchao
    numerics: str


EXACT = "fp32 weights and fp32 AdamW, the experiment as it is"
PROFILES = {
    "speed": Profile(False, 16384, 16384, torch.float32, "adamw", EXACT),
    "32g": Profile(True, 0, 1024, torch.float32, "adamw", EXACT),
    "24g": Profile(True, 0, 1024, torch.float32, "adamw_8bit", "fp32 weights; AdamW's moments in 8 bits"),
    "16g": Profile(
        True, 0, 1024, torch.bfloat16, "adamw_8bit",
        "bf16 weights and gradients, updates rounded stochastically; AdamW's moments in 8 bits",
    ),
}  # fmt: skip


class Plan(NamedTuple):
    """A profile with the settings that replace its own, and what it needs."""

    name: str
    profile: Profile
    needs: dict[str, float]  # item -> bytes on each device

    @property
    def total(self) -> float:
        return sum(self.needs.values())


def plan_all(config: TrainConfig, causal_lm, lengths: list[int], device: torch.device, shards: int) -> dict[str, Plan]:
    """Every profile, for these settings. causal_lm: the model, on the meta device will do. lengths: of the
    training rows, in tokens. shards: processes that share weights, gradients and states."""
    plans = {}
    for name, profile in PROFILES.items():
        if shards > 1 and profile.optim != "adamw":
            continue  # its moments are shared out already
        if config.gradient_checkpointing != "auto":
            profile = profile._replace(gradient_checkpointing=config.gradient_checkpointing == "on")
        if config.micro_batch_tokens >= 0:
            profile = profile._replace(micro_batch_tokens=config.micro_batch_tokens)
        rows = config.per_device_train_batch_size
        if profile.micro_batch_tokens:
            rows *= config.gradient_accumulation_steps
        longest = sorted(lengths, reverse=True)[:rows]
        tokens = sum(longest)
        if profile.micro_batch_tokens:
            tokens = min(tokens, max(profile.micro_batch_tokens, longest[0]))
        autocast = config.mixed_precision == "bf16"
        plans[name] = Plan(name, profile, predict(profile, causal_lm, tokens, autocast, device, shards))
    return plans


def choose(plans: dict[str, Plan], memory: str, device: torch.device, available: float, dry_run: bool = False) -> Plan:
    """The plan of a profile, with a warning if it is predicted not to fit; `auto` is the first of speed and 32g,
    which compute the same, that fits. Raises UserError if neither does, naming the profile that would."""
    if memory not in ("auto", *plans):
        raise UserError(f"--memory {memory} is for one GPU or DDP; with FSDP2 choose among auto, {', '.join(plans)}")
    for name in ("speed", "32g") if memory == "auto" else (memory,):
        if plans[name].total <= available:
            return plans[name]
    fits = [other for other in plans.values() if other.total <= available]
    advice = (
        f"--memory {fits[0].name} needs {fits[0].total / GIB:.1f} GiB ({fits[0].profile.numerics})"
        if fits
        else "no profile fits: a shorter --max-length, a smaller --model, or more GPUs with loop/launch/fsdp2.yaml"
    )
    problem = (
        f"this run needs about {plans[name].total / GIB:.1f} GiB with --memory {name}, and {device} has "
        f"{available / GIB:.1f} GiB. {advice}"
    )
    if memory == "auto" and not dry_run:
        raise UserError(f"{problem}; --dry-run shows what takes how much")
    warn(problem)
    return plans[name]


def predict(
    profile: Profile, causal_lm, tokens: int, autocast: bool, device: torch.device, shards: int
) -> dict[str, float]:
    """Bytes of each item at the peak of a backward over a micro-batch of that many tokens, all of them targets."""
    c = causal_lm.config
    num_parameters = sum(parameter.numel() for parameter in causal_lm.parameters())
    num_trained = sum(parameter.numel() for parameter in causal_lm.parameters() if parameter.requires_grad)
    width = profile.weights.itemsize
    half = 2 if autocast or width == 2 else 4  # bytes of a number that goes into a matrix product
    hidden, mlp = c.hidden_size, c.intermediate_size
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # What autograd keeps of one token in one layer; the factors are measured in tests/test_memory.py.
    factors = {(4, 2): (26, 10, 14, 8), (2, 2): (16, 10, 12, 8), (4, 4): (24, 16, 28, 16)}[width, half]
    layer = tokens * sum(f * size for f, size in zip(factors, (hidden, query, key, mlp), strict=True))
    kept = tokens * hidden * width if profile.gradient_checkpointing else layer
    in_layers = sum(p.numel() for p in causal_lm.model.layers.parameters())
    head = c.vocab_size * hidden
    needs = {
        "weights": num_parameters * width / shards,
        "gradients": num_trained * width / shards,
        # 8-bit moments: a byte each, and a scale in fp32 for every 256 of them.
        "optimizer states": num_trained * (8 if profile.optim == "adamw" else 2 * (1 + 4 / 256)) / shards,
        "activations": c.num_hidden_layers * kept + profile.gradient_checkpointing * 1.5 * layer,
        "logits": min(tokens, profile.loss_chunk) * c.vocab_size * half,
        # The head's gradient in fp32, and the embedding's, which are added at the end of the backward.
    }
    if causal_lm.lm_head.weight.requires_grad:
        needs["gradients of head and embedding, apart"] = head * (4 + width)
    if half < width and not profile.gradient_checkpointing:
        needs["bf16 copies of the weights, for the backward"] = 2 * in_layers
    if shards > 1:
        needs["gathered by FSDP2"] = (head + 2 * in_layers / c.num_hidden_layers) * (half + 4)
    return needs | {"context and allocator": OVERHEAD.get(device.type, OVERHEAD["cuda"])}


def disk_of(plan: Plan, causal_lm, config: TrainConfig, shards: int) -> float:
    """Most bytes that a run has on disk: its checkpoints and the one being written, best/ and the one before it."""
    checkpoint = (plan.needs["weights"] + plan.needs["optimizer states"]) * shards
    number = min(config.save_total_limit, config.max_steps // config.save_steps) + 1
    return number * checkpoint + 2 * 2 * causal_lm.num_parameters()


def memory_of(device: torch.device) -> float:
    """Bytes of the device's memory; of a CPU, this process's share of the machine's."""
    backend = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(backend, "mem_get_info"):
        return backend.mem_get_info(device)[1]
    return psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_table(plans: dict[str, Plan], chosen: str, device: torch.device, available: float) -> str:
    """What each profile needs and changes, and item by item what the chosen one needs."""
    lines = [f"memory: {device} has {available / GIB:.1f} GiB"]
    lines += [
        f"  --memory {name:<6} {plan.total / GIB:6.1f} GiB  {plan.profile.numerics}" for name, plan in plans.items()
    ]
    lines.append(f"{chosen}:")
    lines += [f"  {item:<46}{size / GIB:6.1f} GiB" for item, size in plans[chosen].needs.items()]
    return "\n".join(lines)
