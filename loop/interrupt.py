"""Asking a run to stop: SIGTERM, Ctrl+C, or a file named STOP in its folder."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from loop.console import is_main_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEAT_SECONDS = 5  # a launcher may deliver one Ctrl+C twice


class Interrupt:
    """While entered, a signal only sets a flag; the loop asks for it after each step.

    The same signal again, some seconds after the first, ends the process at once. Another one does not: after a
    Ctrl+C the launcher dies, at its own pace, and a SIGTERM follows.
    """

    def __init__(self, output_dir: Path):
        self.stop_file = output_dir / "STOP"
        self.signalled_at: dict[int, float] = {}
        # On CPUs: asking must not wait for the device.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if dist.is_initialized() else None

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.handle) for number in SIGNALS}
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

    def requested(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank. All ranks."""
        here = bool(self.signalled_at) or (is_main_process() and self.stop_file.exists())
        if self.group is None:
            return here
        asked = torch.tensor(int(here))
        dist.all_reduce(asked, group=self.group)
        return bool(asked)

    def done(self) -> None:
        """Takes the STOP file away, or the next run would stop too. Any rank."""
        self.stop_file.unlink(missing_ok=True)
