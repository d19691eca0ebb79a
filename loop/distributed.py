"""The processes of a run: how they were launched, and what they tell each other."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    send_to_device,
    set_seed,
)
from accelerate.utils.operations import recursively_apply
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method

from data.base.console import is_main_process
from data.base.errors import UserError
from data.batches import seed_of
from loop.config import TrainConfig
from loop.start.launcher import check_launcher, num_threads


class Accelerator(accelerate.Accelerator):
    def no_sync(self, model):
        """Under FSDP2 gradients are shared out after each backward. Left whole until the last one they would take 4
        bytes of each parameter on each GPU: 48 GiB more with 14 billion parameters on 8 GPUs."""
        return nullcontext() if self.is_fsdp2 else super().no_sync(model)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """One process, DDP or FSDP2, as launched. Raises UserError if the launch is not what it says it is."""
    check_launcher(config)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            dynamo_backend="no",
            # The step divides by the number of targets, and nothing else: no environment variable may divide again.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                # A forward casts each weight once, so autocast's cache of bf16 copies would only take memory.
                AutocastKwargs(cache_enabled=False),
                # Gradients live in the buckets that DDP sends, not beside them: 4 bytes a parameter less.
                # Buffers, such as weights in 4 bits, are the same everywhere and need not be sent at each forward.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                # Ranks wait for the main process to download the model, and to write its last samples.
                InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            ],
        )
    except ValueError as error:  # a device without bf16, say
        hint = " (--mixed-precision no computes in fp32)" if "bf16" in str(error) else ""
        raise UserError(f"{error}{hint}") from error
    device = accelerator.device
    # Before Ampere PyTorch emulates bf16, slowly and in part.
    if config.mixed_precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16; --mixed-precision no computes in fp32")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, but each trains by itself ({accelerator.distributed_type}); "
            "look at --num_processes and at the configuration file of accelerate"
        )
    kind, wrong = accelerator.distributed_type, ""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kind != DistributedType.FSDP:
        wrong = f"the launcher asked for FSDP, but it is not active on {accelerator.device} ({kind})"
    elif kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        wrong = "FSDP version 1 is not supported; one process, DDP and FSDP2 are: see loop/launch/"
    if wrong:
        accelerator.wait_for_everyone()  # a rank that still connects would end with a traceback
        raise UserError(wrong)
    if device.type == "cpu" and (threads := num_threads()):
        torch.set_num_threads(threads)
    if accelerator.is_fsdp2 and config.mixed_precision == "bf16":
        # accelerate's own would add gradients of ranks in bf16 and round the loss sums.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def prepare(accelerator: Accelerator, model, optimizers: list) -> tuple[torch.nn.Module, list]:
    """model and optimizers as the launch has them: on the device, under DDP or FSDP2. A group's `lr` so far is its
    peak, and stays in `initial_lr`."""
    note_peaks(optimizers)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    if accelerator.is_fsdp2:
        register_fsdp_forward_method(model, "generate")
    return model, optimizers


def note_peaks(optimizers: list) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = float(group["lr"])


def reshard(model) -> None:
    """FSDP2 leaves some weights gathered after a forward without a backward; what changes the shards then, as an
    average that is swapped in, would not act on the next forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of (seed, step, rank), so there is no state of generators to save."""
    set_seed(seed_of(seed, step, rank))


def on_main_process(decide: Callable):
    """decide() on the main process; every rank returns its value or raises its UserError or OSError. All ranks."""
    outcome = [None, None]
    if is_main_process():
        try:
            outcome[0] = decide()
        except (UserError, OSError) as error:
            outcome[1] = error
    value, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return value


def gather(thing, group=None) -> list:
    """One thing of each rank. All ranks."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size(group)
    dist.all_gather_object(things, thing, group=group)
    return things


def to_device(batches, device: torch.device):
    """Copies tensors in lists and dicts; to CUDA from pinned memory, so that copies and kernels overlap."""
    if device.type == "cuda":
        batches = recursively_apply(torch.Tensor.pin_memory, batches)
    return send_to_device(batches, device, non_blocking=True)


def end_processes(accelerator: Accelerator) -> None:
    """Leaves the process group. All ranks.

    The pause is for gloo: its thread takes Python's lock to drop the tensors of the last collective, and
    joining that thread while holding the lock would hang for ever.
    """
    accelerator.wait_for_everyone()
    if dist.is_initialized():
        time.sleep(0.2)
    accelerator.end_training()
