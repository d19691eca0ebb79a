"""The processes of a run: how they were launched, and deciding on one for all."""

import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    send_to_device,
)
from accelerate.utils.operations import recursively_apply
from torch.distributed.fsdp import MixedPrecisionPolicy

from loop.config import TrainConfig
from loop.run_folder import RunError


def make_accelerator(config: TrainConfig) -> Accelerator:
    """One process, DDP or FSDP2, as launched. Raises RunError where the launch is not what it says it is."""
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            kwargs_handlers=[
                # A forward casts each weight once, so autocast's cache of bf16 copies would only take memory.
                AutocastKwargs(cache_enabled=False),
                # Gradients live in the buckets that DDP sends, not beside them: 4 bytes a parameter less.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                # Ranks wait for the main process to download the model, and to write its last samples.
                InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            ],
        )
    except ValueError as error:  # a device without bf16, say
        raise RunError(f"{error} (--mixed-precision no computes in fp32)") from error
    device = accelerator.device
    # Before Ampere PyTorch emulates bf16, slowly and in part.
    if config.mixed_precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise RunError(f"{torch.cuda.get_device_name(device)} has no bf16; --mixed-precision no computes in fp32")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise RunError(
            f"the launcher started {launched} processes, but each trains by itself ({accelerator.distributed_type}); "
            "look at --num_processes and at the configuration file of accelerate"
        )
    kind = accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kind != DistributedType.FSDP:
        raise RunError(f"the launcher asked for FSDP, but it is not active on {accelerator.device} ({kind})")
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == "FSDP" and not accelerator.is_fsdp2
    ):
        raise RunError(f"{kind} is not supported; one process, DDP and FSDP2 are: see loop/launch/")
    if accelerator.is_fsdp2 and config.mixed_precision == "bf16":
        # accelerate's own would add gradients of ranks in bf16 and round the loss sums.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def on_main_process(accelerator: Accelerator, decide: Callable):
    """decide() on the main process; every rank returns its value or raises its RunError. All ranks."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except RunError as error:
            outcome[1] = error
    value, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return value


def to_device(batches, device: torch.device):
    """Copies tensors in lists and dicts; to CUDA from pinned memory, so that the copies run beside the kernels."""
    if device.type == "cuda":
        batches = recursively_apply(torch.Tensor.pin_memory, batches)
    return send_to_device(batches, device, non_blocking=True)


def end_processes(accelerator: Accelerator) -> None:
    """Leaves the process group. All ranks.

    The pause is for gloo: its thread takes Python's lock to drop the tensors of the last collective, and
    joining that thread while holding the lock would hang for ever.
    """
    accelerator.wait_for_everyone()
    time.sleep(0.2)
    accelerator.end_training()
