"""What accelerate's launcher sets, and what of it may act: processes are the launcher's business, the maths is not."""

import contextlib
import ctypes
import os
import shlex
import signal
import sys
from pathlib import Path

from data.base.console import warn
from data.base.errors import UserError
from loop.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent.parent
# Variables by which accelerate would set what a setting of the loop decides.
DECIDED_HERE = {
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_DYNAMO_BACKEND": "compile",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
}
STRATEGIES = "one process, DDP and FSDP2 are: see loop/launch/"
# Switches of what the loop does not do, or does in another way.
UNSUPPORTED = {
    "ACCELERATE_FP8_BACKEND": "--mixed-precision bf16 and no are",
    "ACCELERATE_USE_DEEPSPEED": STRATEGIES,
    "ACCELERATE_USE_MEGATRON_LM": STRATEGIES,
    "ACCELERATE_USE_PARALLELISM_CONFIG": STRATEGIES,
    "ACCELERATE_USE_SAGEMAKER": STRATEGIES,
    "FSDP_OFFLOAD_PARAMS": "--memory 24g and 16g need less memory on one GPU, and more GPUs less on each",
    "FSDP_ACTIVATION_CHECKPOINTING": "--gradient-checkpointing on does the same",
}
OFF = ("", "no", "0", "1", "false", "none")


def is_launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def check_launcher(config: TrainConfig) -> None:
    """Says which of the launcher's settings do not act; raises UserError if one asks for what is not supported."""
    for name, advice in UNSUPPORTED.items():
        if (value := os.environ.get(name, "")).lower() not in ("", "no", "0", "false"):
            raise UserError(f"{name}={value}, set by the launcher or its configuration, is not supported; {advice}")
    for name, setting in DECIDED_HERE.items():
        value, own = os.environ.get(name, ""), str(getattr(config, setting))
        if value.lower() not in (*OFF, own):
            flag = f"--{setting.replace('_', '-')} {own}"
            warn(f"{name}={value}, set by the launcher or its configuration, is not used; {flag} is")


def num_threads() -> int | None:
    """Threads for a process that computes on a CPU: its share of the cores that it may use. None if their number was
    set before the launch; the launcher itself sets OMP_NUM_THREADS to 1 if nobody did."""
    if not is_launched() or os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return None
    try:
        parent = Path(f"/proc/{os.getppid()}")
        was_set = any(v.startswith(b"OMP_NUM_THREADS=") for v in (parent / "environ").read_bytes().split(b"\0"))
        if was_set or b"--num_cpu_threads_per_process" in (parent / "cmdline").read_bytes():
            return None
    except OSError:
        pass  # not Linux: a 1 counts as the launcher's
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def launch_command() -> str:
    """The command of this launch, to be typed in the folder where it was."""
    command = ["python", *sys.argv]
    if is_launched():
        command = ["accelerate", "launch", *sys.argv]
        with contextlib.suppress(OSError, ValueError):  # with the launcher's own flags, where the system tells them
            words = [os.fsdecode(word) for word in Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")]
            command[2 : -len(sys.argv)] = words[words.index("launch") + 1 : words.index(sys.argv[0])]
    return shlex.join(command)


def resume_command() -> str:
    """The same with --resume at its end."""
    words = shlex.split(launch_command())
    return shlex.join([word for word in words if word not in ("--resume", "--no-resume")] + ["--resume"])


def chat_command(model: Path) -> str:
    """To be typed in the folder of this launch."""
    if Path.cwd() == ROOT:
        return f"python -m tools.chat {shlex.quote(str(model))}"
    return f"(cd {shlex.quote(str(ROOT))} && python -m tools.chat {shlex.quote(str(model.resolve()))})"


def end_with_launcher() -> None:
    """Has SIGTERM sent to this process when accelerate's one-process launcher dies, which forwards no signal.

    Without it the training would go on as an orphan. Without a launcher a process may outlive its parent on
    purpose (nohup), and launchers of several processes end them themselves.
    """
    if is_launched() and "TORCHELASTIC_RUN_ID" not in os.environ and sys.platform == "linux":
        pr_set_pdeathsig, parent = 1, os.getppid()
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGTERM)
