"""What goes wrong in a rank of a test run; called by name before train.main."""

import os
import signal
from pathlib import Path

import torch


def fsdp2_on_cpu() -> None:
    """accelerate refuses FSDP without an accelerator; told it has one, it shards on the CPU with gloo."""
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    import loop.processes

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def make(**kwargs):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        return accelerate.Accelerator(**kwargs, fsdp_plugin=plugin)

    loop.processes.Accelerator = make


def kill_ranks(rank: int | None = None) -> None:
    if rank is None or int(os.environ.get("RANK", "0")) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
