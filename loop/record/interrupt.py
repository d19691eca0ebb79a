"""Asking a run to stop: a signal, a file named STOP in its folder, or its --max-time."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data.base.console import is_main_process, say

# A closed terminal sends SIGHUP; SLURM can be asked for SIGUSR1 before its limit.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
REPEAT_SECONDS = 5  # a launcher may deliver one Ctrl+C twice
STARTED = time.monotonic()


class Stopped(Exception):
    """The run was asked to stop in the middle of an evaluation or of answers, which --resume makes again."""


class Interrupt:
    """While entered, a signal only sets a flag; the loop asks for it after each step, and inside what takes long.

    The same signal again, some seconds after the first, ends the process at once. Another one does not: after a
    Ctrl+C the launcher dies, at its own pace, and a SIGTERM follows.
    """

    def __init__(self, output_dir: Path, max_time: float = 0.0):
        """max_time: hours after which the run stops, counted from its start; 0 for none."""
        self.stop_file, self.deadline = output_dir / "STOP", STARTED + 3600 * (max_time or 1e9)
        self.signalled_at: dict[int, float] = {}
        # On CPUs: asking must not wait for the device.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if dist.is_initialized() else None
        if is_main_process() and self.stop_file.exists():
            self.stop_file.unlink()
            say(f"removed {self.stop_file}, which was left from before")

    def __enter__(self):
        # nohup's SIGHUP stays ignored; but torch's launcher of several processes takes it, and then ends them.
        is_elastic = "TORCHELASTIC_RUN_ID" in os.environ
        heeded = [number for number in SIGNALS if is_elastic or signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self.handle) for number in heeded}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def handle(self, number, frame) -> None:
        now = time.monotonic()
        if not self.signalled_at and is_main_process():
            message = b"\nstopping after this step, with a checkpoint; the same signal again quits at once\n"
            os.write(sys.stderr.fileno(), message)
        if now - self.signalled_at.setdefault(number, now) > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def requested_here(self) -> bool:
        on_main = is_main_process() and (self.stop_file.exists() or time.monotonic() > self.deadline)
        return bool(self.signalled_at) or on_main

    def requested(self, or_on_main: bool = False) -> bool:
        """Whether any rank was asked to stop, or the main process says or_on_main; the same answer on every rank. All
        ranks."""
        here = self.requested_here() or (or_on_main and is_main_process())
        if self.group is None:
            return here
        asked = torch.tensor(int(here))
        dist.all_reduce(asked, group=self.group)
        return bool(asked)

    def check(self) -> None:
        """Raises Stopped on every rank if any was asked to stop. All ranks."""
        if self.requested():
            raise Stopped

    def check_here(self) -> None:
        """The same for one rank alone."""
        if self.requested_here():
            raise Stopped

    def done(self) -> None:
        """Takes the STOP file away, or the next run would stop too. Any rank."""
        self.stop_file.unlink(missing_ok=True)
