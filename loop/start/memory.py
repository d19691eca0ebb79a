"""Memory profiles: what each of them sets and changes, and the bytes that a run will need. GiB are 2**30 bytes."""

import dataclasses
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from data.base.console import warn
from data.base.errors import UserError
from data.base.language import tr
from loop.config import Resolved
from loop.start.activations import itemsize_of_gradients, phases_of_a_step
from loop.start.trial import Tried, try_step
from model.head import SMALL_CHUNK, block_size
from model.nf4 import layers_in_4_bits, tensors_in_4_bits

GIB = 2**30
# Besides the tensors: the CUDA context, and what the allocator cannot use of its blocks (1.2 to 1.7 GiB, by replaying
# its rules on the allocations of a step); Python and its libraries.
OVERHEAD = {"cuda": 1.7 * GIB, "cpu": 0.7 * GIB}


class Profile(NamedTuple):
    gradient_checkpointing: bool
    micro_batch_tokens: int  # 0: per_device_train_batch_size rows each
    loss_chunk: int  # targets whose logits exist at one time
    weights: torch.dtype  # of the gradients too
    optim: str  # adamw, or adamw_8bit, from torchao
    numerics: str


NF4 = "frozen weights in 4 bits, updates in fp32"
EXACT = "fp32 weights and fp32 AdamW, the experiment as it is"
PROFILES = {
    "speed": Profile(False, 16384, 16384, torch.float32, "adamw", EXACT),
    "32g": Profile(True, 8192, 1024, torch.float32, "adamw", EXACT),
    "24g": Profile(True, 8192, 1024, torch.float32, "adamw_8bit", "fp32 weights; AdamW's moments in 8 bits"),
    "16g": Profile(
        True, 8192, 1024, torch.bfloat16, "adamw_8bit",
        "bf16 weights and gradients, updates rounded stochastically; AdamW's moments in 8 bits",
    ),
}  # fmt: skip


class Plan(NamedTuple):
    """A profile with the settings that replace its own, and what it needs."""

    name: str
    profile: Profile
    needs: dict[str, float]  # item -> bytes on each device
    optimizers: list[str]  # class names
    problem: str = ""  # why the step file cannot train with it

    @property
    def total(self) -> float:
        return sum(self.needs.values())

    @property
    def tensors(self) -> float:
        """Without what is no tensor."""
        return self.total - self.needs["context and allocator"]


def plan_all(
    config: Resolved,
    causal_lm,
    lengths: list[int],
    device: torch.device,
    shards: int,
    names: Iterable[str] = PROFILES,
    rows_in_unit: int = 1,
) -> dict[str, Plan]:
    """The named profiles, for these settings, of which `compile` is resolved, with what the step file's own step keeps.
    causal_lm: the model, on the meta device will do. lengths: of the training rows, in tokens. shards: processes that
    share weights, gradients and states. rows_in_unit: 2 if replies are compared."""
    plans, tried = {}, {}
    for name in names:
        profile = PROFILES[name]
        if shards > 1 and profile.optim != "adamw":
            continue  # its moments are shared out already
        if config.gradient_checkpointing != "auto":
            profile = profile._replace(gradient_checkpointing=config.gradient_checkpointing == "on")
        if config.micro_batch_tokens >= 0:
            profile = profile._replace(micro_batch_tokens=config.micro_batch_tokens)
        if config.frozen == "nf4":
            dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
            profile = profile._replace(weights=dtype, numerics=f"{NF4}; {profile.optim}")
        batch = config.per_device_train_batch_size
        longest = sorted(lengths, reverse=True)[: batch * config.gradient_accumulation_steps * rows_in_unit]
        limit = profile.micro_batch_tokens or sum(longest[:batch])
        tokens = min(sum(longest), max(limit, longest[0]))
        kind = profile.weights, profile.optim
        if kind not in tried:
            dtype = profile.weights if config.frozen == "full" else torch.float32  # of what is trained
            tried[kind] = trial_of(causal_lm, dataclasses.replace(config, memory=name, optim=profile.optim), dtype)
        trial = tried[kind]
        if isinstance(trial, str):
            plans[name] = Plan(name, profile, {"context and allocator": 0.0, "unknown": math.inf}, [], trial)
            continue
        needs = predict(profile, config, causal_lm, tokens, sum(longest) > tokens, device, trial, shards)
        plans[name] = Plan(name, profile, needs, trial.optimizers)
    return plans


def trial_of(causal_lm, config: Resolved, dtype: torch.dtype) -> Tried | str:
    """What the step keeps with a profile, or why it cannot be made with it."""
    try:
        return try_step(causal_lm, config, dtype)
    except UserError as error:
        return str(error)


def choose(plans: dict[str, Plan], memory: str, device: torch.device, available: float, dry_run: bool = False) -> Plan:
    """The plan of a profile, with a warning if it is predicted not to fit; `auto` is the first of speed and 32g,
    which compute the same, that fits. Raises UserError if neither does, naming the profile that would."""
    if memory not in ("auto", *plans):
        raise UserError(f"--memory {memory} is for one GPU or DDP; with FSDP2 choose among auto, {', '.join(plans)}")
    for name in ("speed", "32g") if memory == "auto" else (memory,):
        if plans[name].problem:
            raise UserError(plans[name].problem)
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
    profile: Profile,
    config: Resolved,
    causal_lm,
    tokens: int,
    several: bool,
    device: torch.device,
    trial: Tried,
    shards: int = 1,
) -> dict[str, float]:
    """Bytes of each item at the peak of a step, whose largest micro-batch has that many tokens, all of them targets.
    several: it has more micro-batches than one, so gradients are there when a backward begins."""
    trained, frozen = count_parameters(causal_lm)
    weights, states = bytes_of_weights(causal_lm, profile, shards), trial.states / shards
    needs = {"weights": weights, "optimizer states": states}
    half = 2 if config.mixed_precision == "bf16" or profile.weights.itemsize == 2 else 4
    if has_copy := trial.reference == "logits" and not config.lora_rank:
        needs["the reference"] = (trained + frozen) * half / shards
    phases = phases_of_a_step(profile, config, causal_lm, tokens, several, shards)
    phases = [phase | {"copies that the step makes": trial.kept / shards} for phase in phases]
    if trial.function:
        phases[0]["logits"] = of_function(trial, causal_lm, tokens, half, device)
    gradients = trained * itemsize_of_gradients(profile, config) / shards
    phases.append({"gradients": gradients, "temporaries of the update": trial.update / shards})
    if device.type == "cpu":  # on a GPU the copy that is written behind the training lies in the host's memory
        copy = {"the copy that a checkpoint is written from": weights + states}
        if config.save_steps < config.max_steps:
            needs |= copy
        else:
            phases.append(copy)
    if shards > 1:
        c, in_layers = causal_lm.config, sum(p.numel() for p in causal_lm.model.layers.parameters())
        head, layers = c.vocab_size * c.hidden_size, 2 * in_layers / c.num_hidden_layers
        needs["gathered by FSDP2"] = (head + layers) * (half + 4) + head * half * has_copy
    needs |= max(phases, key=lambda phase: sum(phase.values()))
    needs = {item: size for item, size in needs.items() if size}
    return needs | {"context and allocator": OVERHEAD.get(device.type, OVERHEAD["cuda"])}


def of_function(trial: Tried, causal_lm, tokens: int, half: int, device: torch.device) -> float:
    """Bytes of the logits that a function takes, a chunk of them, and of what it makes of a block."""
    c, targets = causal_lm.config, min(tokens, SMALL_CHUNK)
    logits = targets * c.vocab_size * half * (2 if trial.reference == "logits" else 1)
    return logits + trial.function * min(targets, block_size(device.type, c.vocab_size)) * c.vocab_size


def count_parameters(causal_lm) -> tuple[int, int]:
    """Trained, and frozen."""
    trained = sum(parameter.numel() for parameter in causal_lm.parameters() if parameter.requires_grad)
    return trained, causal_lm.num_parameters() - trained + numbers_in_4_bits(causal_lm)


def numbers_in_4_bits(causal_lm) -> int:
    return sum(layer.out_features * layer.in_features for layer in layers_in_4_bits(causal_lm))


def bytes_of_weights(causal_lm, profile: Profile, shards: int) -> float:
    """On each device. Under FSDP2 weights in 4 bits lie whole on each."""
    trained, frozen = count_parameters(causal_lm)
    in_4_bits = tensors_in_4_bits(causal_lm)
    if not in_4_bits:
        return (trained + frozen) * profile.weights.itemsize / shards
    others = frozen - numbers_in_4_bits(causal_lm)
    return (4 * trained + others * profile.weights.itemsize) / shards + sum(tensor.nbytes for tensor in in_4_bits)


def disk_of(plan: Plan, causal_lm, config: Resolved, shards: int) -> float:
    """Most bytes that a run has on disk: its checkpoints and the one being written, best/ and the one before it."""
    checkpoint = (plan.needs["weights"] + plan.needs["optimizer states"]) * shards
    number = min(config.save_total_limit, config.max_steps // config.save_steps) + 1
    return number * checkpoint + 2 * 2 * sum(count_parameters(causal_lm))


def memory_of(device: torch.device) -> float:
    """Bytes of the device's memory that are free; of a CPU, this process's share of what the machine has, or its
    container or `ulimit -v` allows."""
    backend = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(backend, "mem_get_info"):
        free, _ = backend.mem_get_info(device)
        return free + backend.memory_reserved(device)  # its own, which is no obstacle
    return min(psutil.virtual_memory().total, *limits()) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """Of this process's control groups (version 2 and 1) and of its address space; infinite without any."""
    found = [math.inf]
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            version_1 = "memory" in controllers.split(",")
            if not controllers or version_1:
                top, name = (root / "memory", "memory.limit_in_bytes") if version_1 else (root, "memory.max")
                group = top / place.lstrip("/")
                for folder in (group, *group.parents):
                    with suppress(OSError, ValueError):
                        found.append(float((folder / name).read_text()))  # `max` is none
                    if folder == top:
                        break
    with suppress(ImportError, OSError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        found.append(math.inf if limit == resource.RLIM_INFINITY else float(limit))
    return found


def memory_table(plans: dict[str, Plan], chosen: str, device: torch.device, available: float) -> str:
    """What each profile needs and changes, and item by item what the chosen one needs."""
    lines = [tr("memory: {} has {:.1f} GiB", device, available / GIB)]
    lines += [
        f"  --memory {name:<6} {plan.total / GIB:6.1f} GiB  {plan.problem or plan.profile.numerics}"
        for name, plan in plans.items()
    ]
    lines.append(f"{chosen}:")
    lines += [f"  {item:<46}{size / GIB:6.1f} GiB" for item, size in plans[chosen].needs.items()]
    return "\n".join(lines)
