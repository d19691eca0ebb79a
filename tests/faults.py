"""What goes wrong in a rank of a test run; called by name before train.main."""

import os
import signal
from pathlib import Path


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


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def before(owner, name: str, action, when=lambda *args: True) -> None:
    """Has action() called before owner.name(...) wherever when(*its arguments) holds."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if when(*args):
            action()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def after(owner, name: str, action, when=lambda *args: True) -> None:
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        if when(*args):
            action()
        return result

    setattr(owner, name, wrapped)


def in_step(step: int, action) -> None:
    """action() at the begin of the update that follows `step` completed steps."""
    import loop.fit

    before(loop.fit, "lr_at", action, lambda at, **_: at == step)


def kill_in_step(step: int) -> None:
    in_step(step, kill)


def signal_in_step(step: int, number: int = signal.SIGTERM, only_rank: int | None = None) -> None:
    if only_rank in (None, rank()):
        in_step(step, lambda: os.kill(os.getpid(), number))


def kill_at(stage: str) -> None:
    """SIGKILL the first time that a save or an export reaches a stage."""
    from torch.distributed.checkpoint import FileSystemWriter

    import loop.checkpoint
    import model.qwen3

    if stage == "begin":
        before(loop.checkpoint.dcp, "save", kill)
    elif stage == "shards":
        after(FileSystemWriter, "write_data", kill, lambda *_: rank() == 0)
    elif stage == "second_rank":
        before(FileSystemWriter, "write_data", kill, lambda *_: rank() == 1)
    elif stage == "before_rename":
        after(loop.checkpoint, "write_json", kill, lambda path, _: path.name == "manifest.json")
    elif stage == "after_rename":
        after(Path, "rename", kill, lambda path, _: path.name.startswith(".tmp-step"))
    elif stage == "pruning":

        def half_way() -> None:
            trash = next(Path(str(doomed[-1])).rglob("*.distcp"))
            trash.unlink()
            kill()

        doomed = []
        before(
            loop.checkpoint.shutil,
            "rmtree",
            half_way,
            lambda path, *_: ".trash-" in str(path) and not doomed.append(path),
        )
    elif stage == "export":
        before(model.qwen3, "generation_config", kill)
    elif stage == "export_renames":
        before(Path, "rename", kill, lambda path, _: path.name == ".tmp-best")
    elif stage == "training":
        kill_in_step(7)
    else:
        raise ValueError(stage)
