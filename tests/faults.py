"""What goes wrong in a rank of a test run; called by name before train.main."""

import itertools
import os
import signal
from pathlib import Path


def fsdp2_on_cpu() -> None:
    """What the launcher makes of fsdp2.yaml, on a CPU with gloo.

    accelerate refuses FSDP without an accelerator, so it is told that it has one.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = Path(__file__).parent.parent / "loop/launch/fsdp2.yaml"
    asked = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", "train.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(asked)[0])
    os.environ |= {name: value for name, value in environment.items() if "FSDP" in name}
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def capability(name: str) -> None:
    """As on a CPU with these instructions; AVX2 has no bf16."""
    import torch

    torch.backends.cpu.get_cpu_capability = lambda: name


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
    """action() when the update after `step` completed steps begins."""
    import loop.fit

    before(loop.fit, "seed_step", action, lambda seed, at, rank: at == step)


def once_written(step: int, action) -> None:
    """action() in the update after `step` completed steps, once the checkpoint before it is written."""
    from loop.record.checkpoint_writer import CheckpointWriter

    writers = []
    before(CheckpointWriter, "save", lambda: None, lambda self, *_: writers.append(self))
    in_step(step, lambda: ([writer.writing[1].exception() for writer in writers[-1:]], action()))


def kill_in_step(step: int) -> None:
    once_written(step, kill)


def this_run() -> list:
    """A list that will hold the Run."""
    from loop.run import Run

    runs = []
    before(Run, "__enter__", lambda: None, runs.append)
    return runs


def signal_in_step(step: int, number: int = signal.SIGTERM, only_rank: int | None = None) -> None:
    if only_rank in (None, rank()):
        in_step(step, lambda: os.kill(os.getpid(), number))


def kill_at(stage: str) -> None:
    """SIGKILL the first time that a save or an export reaches a stage."""
    from torch.distributed.checkpoint import FileSystemWriter

    import loop.record.checkpoint_writer
    import model.export

    if stage == "begin":
        before(loop.record.checkpoint_writer.dcp, "save", kill)
    elif stage == "shards":
        after(FileSystemWriter, "write_data", kill, lambda *_: rank() == 0)
    elif stage == "second_rank":
        before(FileSystemWriter, "write_data", kill, lambda *_: rank() == 1)
    elif stage == "before_rename":
        after(loop.record.checkpoint_writer, "write_json", kill, lambda path, _: path.name == "manifest.json")
    elif stage == "after_rename":
        after(Path, "rename", kill, lambda path, _: path.name.startswith(".tmp-step"))
    elif stage == "pruning":

        def half_way() -> None:
            trash = next(Path(str(doomed[-1])).rglob("*.distcp"))
            trash.unlink()
            kill()

        doomed = []
        before(
            loop.record.checkpoint_writer.shutil,
            "rmtree",
            half_way,
            lambda path, *_: ".trash-" in str(path) and not doomed.append(path),
        )
    elif stage == "export":
        before(model.export, "generation_config", kill)
    elif stage == "export_renames":
        before(Path, "rename", kill, lambda path, _: path.name == ".tmp-best")
    elif stage == "training":
        kill_in_step(7)
    else:
        raise ValueError(stage)


def at_step() -> list[int]:
    """A list whose one number is that of the steps completed when the last update began."""
    import loop.fit

    now = [-1]
    before(loop.fit, "seed_step", lambda: None, lambda seed, at, rank: now.__setitem__(0, at))
    return now


def record_rows(folder: str) -> None:
    """Every row that the model is given, as one line: the step (or -1 in an evaluation), its tokens, its targets."""
    import json

    import loop.evaluate
    from model.loss import SFTModel

    now, path = at_step(), Path(folder) / f"{rank()}.jsonl"
    now[0] = None  # before the first evaluation rows of no data set are laid end to end, to see whether they meet
    before(loop.evaluate, "score", lambda: now.__setitem__(0, -1))

    def forward(self, *args, **batch):
        if now[0] is not None and batch["target_ids"].numel():
            ends = batch["cu_seqlens"].tolist()
            with path.open("a") as file:
                for start, end in itertools.pairwise(ends):
                    file.write(json.dumps([now[0], batch["input_ids"][0, start:end].tolist()]) + "\n")
        return original(self, **batch)

    original, SFTModel.forward = SFTModel.forward, forward


def resave(folder: str) -> None:
    """Saves what a resume has loaded, before any step is made, as another checkpoint."""
    import loop.fit
    from loop.record.checkpoint_writer import CheckpointWriter
    from loop.state import TrainState

    load = loop.fit.load_checkpoint

    def load_and_save(source, accelerator, model, optimizers):
        load(source, accelerator, model, optimizers)
        writer = CheckpointWriter(Path(folder), 99, accelerator.device)
        writer.save(model, optimizers, TrainState("", step=int(source.name[5:])))
        writer.wait(is_last=True)

    loop.fit.load_checkpoint = load_and_save


def in_fp64() -> None:
    """The model and all it computes in fp64: what is left of a difference is a mistake, not rounding."""
    import transformers.models.qwen3.modeling_qwen3 as qwen3

    import loop.fit

    def forward(self, hidden):
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * (variance + self.variance_epsilon).rsqrt())

    qwen3.Qwen3RMSNorm.forward = forward
    load = loop.fit.load_model
    loop.fit.load_model = lambda *args, **kwargs: load(*args, **kwargs).double()


def nan_in(steps=(), evaluations=(), only_rank: int = 0) -> None:
    """The loss of one rank is NaN in the updates that follow so many steps, or in evaluations (0 is the first)."""
    import loop.evaluate
    from model.loss import SFTModel

    now, count = at_step(), [-1]
    before(loop.evaluate, "score", lambda: (now.__setitem__(0, -1), count.__setitem__(0, count[0] + 1)))

    def forward(self, **batch):
        out = original(self, **batch)
        bad = now[0] in steps if self.training else count[0] in evaluations
        if not bad or rank() != only_rank:
            return out
        return out * float("nan") if self.training else (out[0] * float("nan"), out[1])

    original, SFTModel.forward = SFTModel.forward, forward


def kill_around_evaluation(step: int, moment: str) -> None:
    """SIGKILL before the evaluation after `step` steps, once its loss is known, once it is exported, once logged."""
    import loop.evaluate
    from loop.run import Run
    from loop.state import TrainState

    run = this_run()

    def here(*_) -> bool:
        return run[0].state.step == step

    if moment == "before":
        before(loop.evaluate, "score", kill, here)
    elif moment == "evaluated":
        after(loop.evaluate, "score", kill, here)
    elif moment == "exported":
        after(TrainState, "evaluated", kill, here)
    elif moment == "logged":
        after(Run, "evaluated", kill, here)
    else:
        raise ValueError(moment)


def write_fails(error: str, steps, only_rank: int = 0, where: str = "shards") -> None:
    """Writing a checkpoint (its shards, its manifest) or the best model raises on one rank at these steps."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.api import CheckpointException

    import loop.record.checkpoint_writer
    import loop.run
    import model.export

    raised = {
        "OSError": OSError(28, "No space left on device"),
        "RuntimeError": RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0"),
        "CheckpointException": CheckpointException(
            "write", {only_rank: (OSError(28, "No space left on device"), None)}
        ),
        "SafetensorError": SafetensorError("I/O error: No space left on device (os error 28)"),
    }[error]
    now = [None]
    if where == "export":
        before(loop.run.Run, "evaluated", lambda: None, lambda run, *_: now.__setitem__(0, run.state.step))
    else:
        before(
            loop.record.checkpoint_writer,
            "write_checkpoint",
            lambda: None,
            lambda *args: now.__setitem__(0, args[2]["step"]),
        )

    def fail():
        raise raised

    def here(*_) -> bool:
        return now[0] in steps and rank() == only_rank

    if where == "shards":
        before(FileSystemWriter, "write_data", fail, here)
    elif where == "manifest":
        before(loop.record.checkpoint_writer, "write_json", fail, here)
    elif where == "export":
        before(model.export, "generation_config", fail, here)
    else:
        raise ValueError(where)


def started_apart() -> None:
    """The launcher says two processes, but this one knows nothing of the other."""
    from accelerate.state import PartialState

    PartialState(cpu=True)
    os.environ["WORLD_SIZE"] = "2"


def tiny_as_it_is() -> None:
    """The preset and the model of a user."""
    import dataclasses

    import small

    import loop.config
    import model.tiny

    model.tiny.Qwen3Config = small.Qwen3Config
    own = {"dataset": ("sample",), "per_device_train_batch_size": 2}
    loop.config.PRESETS["tiny"] = dataclasses.replace(loop.config.PRESETS["tiny"], **own)


def card_of(gib: float) -> None:
    """The device has so much memory."""
    import loop.start.resolve

    loop.start.resolve.memory_of = lambda device: gib * 2**30


def kill_in_loading() -> None:
    import loop.fit

    loop.fit.load_model = lambda *args, **kwargs: kill()


def keep_state() -> None:
    """What a researcher may add to the step: state of a parameter besides the optimizer's own; an average of the
    weights, a tensor of another shape, and a number."""
    import torch

    import loop.fit

    load = loop.fit.load_step_file

    def load_step_file(*args):
        method = load(*args)
        original = method.train_step

        def train_step(model, optimizers, *more):
            metrics = original(model, optimizers, *more)
            with torch.no_grad():
                for parameter in model.parameters():
                    state = optimizers[0].state[parameter]
                    state.setdefault("average", parameter.clone()).lerp_(parameter, 0.1)
                    state.setdefault("norms", torch.zeros(2, dtype=torch.float64)).add_(0.1)
                    state["updates"] = state.get("updates", 0) + 1
            return metrics

        method.train_step = train_step
        return method

    loop.fit.load_step_file = load_step_file


def interrupt_in_last_answers() -> None:
    import loop.samples

    before(loop.samples.Samples, "answer_with_best", lambda: os.kill(os.getpid(), signal.SIGINT))


def disk_of(gigabytes: float) -> None:
    """The disk has so much room."""
    import collections

    import loop.start.resolve

    usage = collections.namedtuple("usage", "free")(gigabytes * 1e9)
    loop.start.resolve.shutil = type("shutil", (), {"disk_usage": staticmethod(lambda _: usage)})


def fill_disk(step: int, file: str, free: int) -> None:
    """Once so many steps are completed the disk has only so many bytes left."""
    import shutil

    def fill() -> None:
        with open(file, "wb") as out:
            out.write(b"0" * (shutil.disk_usage(Path(file).parent).free - free))

    once_written(step, fill)


def as_on_windows() -> None:
    """Without the modules, functions and signals that Windows lacks."""
    import sys

    sys.modules["fcntl"] = sys.modules["resource"] = None
    for name in ("sysconf", "sched_getaffinity"):
        delattr(os, name)
    import data.base.files
    import loop.record.interrupt
    import loop.record.tracking

    loop.record.interrupt.SIGNALS = [signal.SIGTERM, signal.SIGINT]
    memory = type("memory", (), {"peak_wset": 2**30})
    loop.record.tracking.psutil = type(
        "psutil", (), {"Process": lambda: type("p", (), {"memory_info": lambda self: memory})()}
    )
    opened = os.open

    def no_folders(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    data.base.files.os = type("os", (), {**vars(os), "name": "nt", "open": no_folders})


def refuse_fp64() -> None:
    """Every operator that makes a tensor in fp64 fails, as on Apple's MPS."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if any(getattr(tensor, "dtype", None) == torch.float64 for tensor in tree_leaves(out)):
                raise TypeError(f"this device has no float64 ({function})")
            return out

    Refuse().__enter__()


def cannot_import(package: str, reason: str = "") -> None:
    """Importing the package fails: because it is not there, or for another reason."""
    import builtins
    import sys

    original = builtins.__import__
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]

    def fail(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(reason) if reason else ModuleNotFoundError(f"No module named {package!r}", name=package)
        return original(name, *args, **kwargs)

    builtins.__import__ = fail


def signal_in(where: str, call: int, number: str) -> None:
    """A signal, to the last rank alone, when an evaluation, or answers to questions, begin for the call-th time."""
    import loop.evaluate
    import loop.samples

    owner, name = {"evaluate": (loop.evaluate, "score"), "answer": (loop.samples, "reply_to")}[where]
    calls = itertools.count()
    if rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        send = getattr(signal, number)
        before(owner, name, lambda: os.kill(os.getpid(), send), lambda *_: next(calls) == call)


def rename_weights() -> None:
    """The state dict has the names that torch.compile around the model would give it."""
    from accelerate import Accelerator

    original = Accelerator.get_state_dict

    def get_state_dict(self, *args, **kwargs):
        return {name.replace("causal_lm.", "_orig_mod."): w for name, w in original(self, *args, **kwargs).items()}

    Accelerator.get_state_dict = get_state_dict


def gradients_are_shared_out() -> None:
    """Ends the run if after a backward this rank holds a gradient that is not its shard alone."""
    from torch.distributed.tensor import DTensor

    from loop.distributed import Accelerator

    backward = Accelerator.backward

    def checked(accelerator, loss):
        backward(accelerator, loss)
        for name, parameter in accelerator._models[-1].named_parameters():
            if not isinstance(parameter.grad, DTensor):
                raise RuntimeError(f"{name} has no shard of a gradient after a backward")

    Accelerator.backward = checked


def elsewhere(folder: str) -> None:
    """Rank 1 works in another folder, as a machine that shares no disk."""
    if rank():
        os.chdir(folder)


def answers_on_main_alone() -> None:
    """A rank that answered beside the main process would end a token apart from it one day, and both wait."""
    import loop.samples

    if rank():
        loop.samples.reply_to = lambda *_, **__: kill()


def let_rows_reach_each_other() -> None:
    """As if nobody told attention where a row begins."""
    import model.attention

    own = model.attention.attend_row_by_row
    model.attention.attend_row_by_row = lambda q, k, v, cu_seqlens, *rest: own(q, k, v, cu_seqlens[[0, -1]], *rest)
