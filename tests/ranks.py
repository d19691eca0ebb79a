"""Whole runs of train.py in forked processes: one process, DDP or FSDP2 on a CPU, with faults put in."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

# One server imports everything once; each rank is then a fork of it, ready in a tenth of a second.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "transformers.models.qwen3.modeling_qwen3",
     "model.recurrent",
     "train", "loop.fit", "loop.step", "tools.report", "model.qwen3", "faults", "warm", "datasets",
     "swanlab", "peft", "torchao.optim"]
)  # fmt: skip


@functools.cache
def start_server() -> None:
    """Before Python 3.12 the server does not get sys.path, and what it cannot import it leaves out without a word."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver.ensure_running()
    if path is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = path


# Each worker of pytest-xdist has its own, below those that the system gives to connections: a port that is free now
# must still be free when the first rank listens on it.
FIRST = 20_000 + 2_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 6)
PORTS = itertools.cycle(range(FIRST, FIRST + 2_000))


def free_port() -> int:
    while True:
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port := next(PORTS)))
            return port


class Outcome(NamedTuple):
    codes: list[int]  # exit status of each rank; -9 where it was killed
    output: str  # stdout and stderr of all ranks


class Ranks:
    """The processes of one launch."""

    def __init__(self, args, strategy: str = "one", fault: str = "", log: Path | None = None, **env):
        """strategy: one, ddp<processes>, or fsdp2 (two processes). fault: a call into faults.py, on every rank.
        env: variables to set, or None to leave out."""
        world = 1 if strategy == "one" else 2 if strategy == "fsdp2" else int(strategy.removeprefix("ddp"))
        variables = {"OMP_NUM_THREADS": "1", "SWANLAB_MODE": "disabled", "ACCELERATE_USE_CPU": "true", "NO_COLOR": "1"}
        if world > 1:
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            variables |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        start_server()
        self.log = Path(log or os.devnull)
        self.processes = []
        for rank in range(world):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            job = (list(map(str, args)), strategy, fault, str(self.log), {**variables, **ranks, **env})
            process = SERVER.Process(target=rank_main, args=job)
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 120) -> Outcome:
        """As a launcher does: when one rank fails the others are ended."""
        end = time.monotonic() + timeout
        while any(process.exitcode is None for process in self.processes):
            failed = any(process.exitcode not in (None, 0) for process in self.processes)
            if failed or time.monotonic() > end:
                time.sleep(0.3 if failed else 0)  # ranks that fail alike may say so
                self.kill()
            time.sleep(0.01)
        codes = [process.exitcode for process in self.processes]
        assert time.monotonic() < end, f"hangs: {self.output()[-3000:]}"
        return Outcome(codes, self.output())

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""

    def kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def run(args, strategy: str = "one", fault: str = "", log: Path | None = None, **env) -> Outcome:
    if log is not None:
        Path(log).unlink(missing_ok=True)
    return Ranks(args, strategy, fault, log, **env).wait()


def uninterrupted(arguments, tmp_path_factory):
    """strategy -> the folder of a run that nothing interrupted, made once; arguments(strategy, folder)."""

    @functools.cache
    def folder_of(strategy: str) -> Path:
        folder = tmp_path_factory.mktemp(strategy) / "whole"
        outcome = run(arguments(strategy, folder), strategy, log=folder.parent / "log")
        assert set(outcome.codes) == {0}, outcome.output
        return folder

    return folder_of


def rank_main(args: list[str], strategy: str, fault: str, log: str, env: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=env.get("STDIO", "utf-8"), errors="strict", line_buffering=True)
    os.environ.update({name: value for name, value in env.items() if value is not None})
    for name in [name for name, value in env.items() if value is None]:
        os.environ.pop(name, None)
    for name in ("SWANLAB_API_KEY", "SWANLAB_PROJECT"):
        if name not in env:
            os.environ.pop(name, None)
    import faults
    import torch

    import tools.report
    import train

    torch.set_num_threads(1)
    if "CHINESE" not in env:
        train.speak = lambda language: None
    if "DRAW" not in env:  # a fifth of such a run; test_report.py looks at the curves
        tools.report.draw = lambda *_: None
    if strategy == "fsdp2":
        faults.fsdp2_on_cpu()
    if fault:
        eval(fault, vars(faults))
    train.main(args)


class Race:
    """A race in a process of its own, whose runs are forks of it."""

    def __init__(self, args, log: Path):
        start_server()
        env = {"OMP_NUM_THREADS": "1", "SWANLAB_MODE": "disabled", "ACCELERATE_USE_CPU": "true", "NO_COLOR": "1"}
        self.log = Path(log)
        self.process = SERVER.Process(target=race_main, args=(list(map(str, args)), str(log), env))
        self.process.start()

    def wait(self, timeout: float = 120) -> Outcome:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "hangs"
        return Outcome([self.process.exitcode], self.log.read_text(encoding="utf-8", errors="replace"))

    def until(self, moment, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not moment():
            assert self.process.is_alive() and time.monotonic() < end, self.log.read_text()
            time.sleep(0.005)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def race_main(args: list[str], log: str, env: dict[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(env)

    import tools.reports.side_by_side
    from tools import race

    def popen(command, stdout, stderr, **_):
        flags = command[[Path(word).name for word in command].index("train.py") + 1 :]
        return Forked(rank_main, flags, "one", "", stdout.name, env)

    race.Popen, tools.reports.side_by_side.draw_runs = popen, lambda *_: None
    sys.argv = ["race", *args]
    sys.orig_argv = ["python", "-m", "tools.race", *args]
    race.main()


class Forked:
    """As subprocess.Popen, of a function."""

    def __init__(self, target, *args):
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.setsid()
                sys.argv = ["train.py", *args[0]]
                target(*args)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
